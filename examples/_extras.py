"""The scripts here import this first. Where a package is missing they then end with what to install."""

import sys
from types import TracebackType

usual = sys.excepthook


def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line in the place of a traceback."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return usual(kind, error, trace)
    package = error.name.partition(".")[0]
    print(f'{package} is not installed: pip install ".[examples]" in the folder of the repository', file=sys.stderr)


sys.excepthook = explain
