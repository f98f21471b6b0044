"""One file that holds a run: written whole or not at all, and read without executing anything that is in it."""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

FORMAT = "imaml-checkpoint"
VERSION = 2

Checkpoint = dict[str, Any]

ENTRIES = frozenset(
    {
        "format",  # FORMAT
        "version",  # VERSION
        "config",  # Config.to_dict()
        "theta",  # parameters by name
        "outer",  # state_dict of Adam
        "schedule",  # state_dict of the learning rate schedule
        "sampler",  # state_dict of the training sampler
        "rng",  # torch's global generator
        "progress",  # Progress of train.py as plain values
        "split",  # Split.to_dict(), None for sinusoids
        "classes",  # names of all classes in the order of the indices of the split
        "source_key",  # which data
        "data_dir",  # where they were found, to find them again; None where no file is needed
    }
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, written or used for what was asked; the message says what to do."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write beside the target, then move there: a reader sees the old file or the new one, even after a power cut.

    Raises:
        CheckpointError: the folder cannot be written, or the disk is full.
    """
    if set(checkpoint) != ENTRIES:
        raise ValueError(f"expected the entries {sorted(ENTRIES)}, got {sorted(checkpoint)}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        raise CheckpointError(
            f"could not write the checkpoint {path} ({error}); the last one, if there is one, is as it was. "
            "Check the free space and the permissions of the folder, or name another one with --out"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """The entries of a checkpoint, tensors on the CPU.

    Raises:
        CheckpointError: there is no such file, or it is damaged, of something else, or of another version.
    """
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}; expected a checkpoint.pt, or the folder of a run that has one")
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); give yourself the right to, or copy it"
        ) from error
    try:
        with warnings.catch_warnings(action="ignore"):  # on a foreign file torch warns before it fails
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums
            if damaged is not None:
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged or foreign file makes zipfile and the unpickler raise nearly anything.
    except Exception as error:
        if path.suffix != ".pt":
            raise CheckpointError(
                f"{path} is no checkpoint of imaml; expected a checkpoint.pt, or the folder of a run that has one"
            ) from error
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint of imaml; nothing in it was executed. Use another one, or train again "
            "with --overwrite"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by imaml; expected a checkpoint.pt from the folder of a run")
    if checkpoint.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {checkpoint.get('version')!r}, this program reads {VERSION}; "
            "use the program that wrote it"
        )
    if set(checkpoint) != ENTRIES:
        raise CheckpointError(
            f"{path} is incomplete: missing {sorted(ENTRIES - set(checkpoint))}; use another one, or train again"
        )
    return checkpoint


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where the system can open folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
