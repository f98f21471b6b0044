"""The program `imaml`, also as `python -m applications.meta_learning`."""

import sys
import warnings


def main() -> None:
    """Run it, or say what to install: the packages that it needs are an extra."""
    try:
        from applications.meta_learning.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("applications", "bilevel")):
            raise  # a fault of ours, which no installation mends
        sys.exit(
            f'imaml needs {error.name}, which is not installed: pip install ".[meta-learning]" in the folder of the repository'
        )
    except KeyboardInterrupt:  # while PyTorch is loaded
        sys.exit(130)
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text, and a terminal may lack the letters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = _plainly  # type: ignore[assignment]  # of the arguments only the first is looked at
    app()


def _plainly(message: object, *_: object) -> str:
    """A warning as a user of the command reads it: without file, line and source."""
    return f"Warning: {message}\n"


if __name__ == "__main__":
    main()
