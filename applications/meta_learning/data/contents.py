"""Equal images: what was trained on, or was support, must not be what is judged."""

import hashlib
import warnings
from pathlib import Path

from applications.meta_learning.data.classes import DataError


class Contents:
    """The images that were read so far, by a hash of their content.

    An image that is in two parts could be trained on and held out, and is refused. Twice in one part, it could be support and query of
    one task, which matters less, and large collections have some of these: a warning.
    """

    def __init__(self) -> None:
        self._seen: dict[bytes, tuple[str, str]] = {}
        self._twice: list[tuple[str, str]] = []

    def add(self, content: bytes, part: str, where: Path | str) -> None:
        """One more. part: images of different parts have to differ.

        Raises:
            DataError: it is in another part too.
        """
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest not in self._seen:
            self._seen[digest] = part, str(where)
            return
        other_part, other = self._seen[digest]
        if other_part != part:
            raise DataError(
                f"{where}: expected different images in {other_part!r} and {part!r}, found the same one as {other}; one could be "
                "trained on and the other one held out. Take one of them out (of a folder that is there twice: the folder)"
            )
        self._twice.append((other, str(where)))

    def warn(self) -> None:
        """Tell of those that are twice in one part."""
        if self._twice:
            first, second = self._twice[0]
            warnings.warn(
                f"{second} is the same image as {first}; it could be support and query of one task, which makes the accuracy too high. "
                f"Take it out (and {len(self._twice) - 1} more)",
                stacklevel=2,
            )
