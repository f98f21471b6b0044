"""How the settings become options of the command line, and how errors are reported on it."""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import torch
import typer
from rich.console import Console

from applications.meta_learning.checkpoint import CheckpointError
from applications.meta_learning.config import INNER, Config, ConfigError, option_name
from applications.meta_learning.data import DataError
from applications.meta_learning.run import RunError

START = "Start here"

out, err = Console(), Console(stderr=True)

DataDir = Annotated[
    Path | None,
    typer.Option(
        help="omniglot (or BILEVEL_OMNIGLOT): folder with images_background.zip and images_evaluation.zip, or unpacked; "
        "mini-imagenet (or BILEVEL_MINI_IMAGENET): with train.csv, test.csv and images, or train and test, or pickles; "
        "folder: with one folder of images for each class",
        rich_help_panel=START,
    ),
]
Download = Annotated[
    bool,
    typer.Option(
        "--download", metavar="", help="omniglot: fetch the archives (14 MB) if missing", rich_help_panel=START
    ),
]

GENERATED = ("glyphs", "sinusoid")
ENVIRONMENT = {"omniglot": "BILEVEL_OMNIGLOT", "mini-imagenet": "BILEVEL_MINI_IMAGENET"}


def data_dir_for(dataset: str, given: Path | None, download: bool = False) -> Path | None:
    """The folder that was named, by the option or in the environment.

    Raises:
        ConfigError: an option about files, and no files are read.
    """
    if dataset in GENERATED and (given or download):
        raise ConfigError(
            f"{dataset} is generated and reads no files, so {'--data-dir' if given else '--download'} has no meaning; name the data with "
            "--dataset omniglot, mini-imagenet or folder"
        )
    if download and dataset != "omniglot":
        raise ConfigError(
            f"--download: only omniglot can be fetched, got the data set {dataset}; leave it out, and name a folder with --data-dir"
        )
    named = os.environ.get(ENVIRONMENT.get(dataset, ""))
    return given or (Path(named) if named else None)


TEST_SETTINGS = [f.name for f in fields(Config) if f.metadata["panel"] == INNER] + ["chunk_size", "device", "threads"]


def with_settings(names: list[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option for each of these fields of `Config`; the command gets those that were given as `settings`."""
    by_name, types = {f.name: f for f in fields(Config)}, get_type_hints(Config)

    def option(name: str) -> inspect.Parameter:
        meta = by_name[name].metadata
        # Of a choice the help text names the values, in less space. A flag has none.
        shown = "CHOICE" if get_origin(types[name]) is Literal else "" if types[name] is bool else None
        info = typer.Option(help=meta["help"], rich_help_panel=meta["panel"], show_default=False, metavar=shown)
        annotation = Annotated[types[name] | None, info]  # type: ignore[valid-type]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()

        def call(**arguments: Any) -> None:  # typer passes by keyword what the signature below lists
            given = {name: arguments.pop(name) for name in names}
            command(**arguments, settings={name: value for name, value in given.items() if value is not None})

        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name != "settings"] + [
            option(name) for name in names
        ]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        return call

    return decorate


class reported_errors:  # noqa: N801 - reads as what it does in a with statement
    """Expected errors become one message and exit code 2; an interruption becomes 130."""

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Report and exit."""
        if isinstance(error, torch.OutOfMemoryError):
            error = ConfigError(
                "the device is out of memory; --chunk-size N (train, evaluate) works on N tasks at a time, or use --device cpu"
            )
        if isinstance(error, ConfigError | CheckpointError | DataError | RunError | OSError):
            err.print("[bold red]Error:[/bold red] ", end="")
            err.print(_words(error), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2)
        if isinstance(error, KeyboardInterrupt):
            err.print("Interrupted; what was written before is as it was.")
            raise typer.Exit(130)


def _words(error: Exception) -> str:
    """The message, with settings named as the options that they are here, and with what to do about the system's errors."""
    name, colon, rest = str(error).partition(": ")
    if isinstance(error, ConfigError) and name in {f.name for f in fields(Config)}:
        return f"{option_name(name)}{colon}{rest}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space, or name a folder on another disk" if full else "name another folder with --out"
        return f"{where}{error.strerror or error}; {advice}. What was written before is as it was"
    return str(error)
