"""What a run leaves behind as files: settings, environment, one JSON object per logged step, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

import bilevel

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Entry = dict[str, Any]

CODE = ("applications", "benchmarks", "bilevel", "examples", "pyproject.toml")  # what a number can depend on

NO_TENSORBOARD = (
    "TensorBoard is not installed, so nothing is written for it (pip install tensorboard); "
    "log.jsonl has the same numbers."
)


class RunLog:
    """Appends entries to log.jsonl, flushed line by line, and to TensorBoard where it is installed.

    at_step: entries of later steps (from a run that was interrupted after its last checkpoint) are dropped first.
    """

    def __init__(self, folder: Path, *, at_step: int, tensorboard: bool) -> None:
        self.path = folder / "log.jsonl"
        kept = [entry for entry in read_log(self.path) if entry["step"] <= at_step] if self.path.exists() else []
        write_atomically(self.path, "".join(_line(entry) for entry in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _open_tensorboard(folder / "tensorboard", at_step) if tensorboard else None
        self.note = NO_TENSORBOARD if tensorboard and self._board is None else ""

    def write(self, kind: str, step: int, seconds: float, values: Entry) -> Entry:
        """One line. kind: "train", "evaluation" or "changed"."""
        entry = {"kind": kind, "step": step, "seconds": round(seconds, 3), **values}
        with naming(self.path):
            self._file.write(_line(entry))
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._board.add_scalar(f"{kind}/{name}", value, global_step=step)
        return entry

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


ALWAYS: tuple[tuple[str, Any], ...] = (("kind", str), ("step", int), ("seconds", int | float))
"""What every entry has."""


def read_log(path: Path) -> list[Entry]:
    """The entries of a log; a line that is damaged or was cut off is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in ALWAYS):
            entries.append(entry)
    return entries


def write_json(path: Path, values: Any) -> None:
    """A readable JSON file, whole or not at all."""
    write_atomically(path, to_json(values) + "\n")


def to_json(values: Any) -> str:
    """Readable JSON."""
    return json.dumps(_plain(values), indent=2, ensure_ascii=False)


def write_atomically(path: Path, text: str) -> None:
    """Write beside the target, then move there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            temporary.write_text(text, encoding="utf-8", errors="replace")  # of a file name that is no text
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # of a full disk


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """The system says which file cannot be opened, but not which one cannot be written to, because the disk is full."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def environment(device: torch.device) -> Entry:
    """The facts that a number depends on."""
    return {
        "bilevel": bilevel.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
    }


def provenance(facts: Entry) -> str:
    """Where numbers come from, in words: the device, the versions, the commit of these facts of :func:`environment`."""
    processor, count, commit = facts["processor"], facts["threads"], facts.get("commit")
    device = facts.get("device", "cpu")
    hardware = f"{processor}, {count} thread{'s' * (count != 1)}" if device == "cpu" else f"{device} beside {processor}"
    if commit is None:
        code = f"bilevel {facts['bilevel']}, not from a repository"
    else:
        code = f"commit `{commit[:12]}`" + (
            " with changes that were not committed" if commit.endswith("+changes") else ""
        )
    return f"Hardware: {hardware}; torch {facts['torch']}; {code}"


def _line(entry: Entry) -> str:
    return json.dumps(_plain(entry)) + "\n"


def _plain(value: Any) -> Any:
    """NaN and infinity are no JSON; null is."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_tensorboard(folder: Path, at_step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=at_step + 1)


def _commit() -> str | None:
    """The commit of the source tree, with "+changes" where code was edited; None for an installed package."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", *CODE) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
