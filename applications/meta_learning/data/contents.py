"""Equal images: what was trained on, or was support, must not be what is judged."""

import hashlib
import warnings
from pathlib import Path

from applications.meta_learning.data.classes import DataError


class Contents:
    """The images that were read so far, by a hash of their content.

    An image that is in two parts could be trained on and held out, and is refused. Twice in one part, it could be support and query of
    one task, which matters less, and large collections have some of these: a warning.

    Args:
        few: the share of images that may be in two parts: of a collection that others made, and nobody can take apart.
    """

    def __init__(self, few: float = 0.0) -> None:
        self._few, self._images = few, 0
        self._seen: dict[bytes, tuple[str, str]] = {}
        self._twice: list[tuple[str, str]] = []
        self._in_two_parts: list[str] = []

    def add(self, content: bytes, part: str, where: Path | str) -> None:
        """One more. part: images of different parts have to differ."""
        digest = hashlib.blake2b(content, digest_size=16).digest()
        self._images += 1
        other_part, other = self._seen.setdefault(digest, (part, str(where)))
        if other_part != part:
            self._in_two_parts.append(
                f"{where}: expected different images in {other_part!r} and {part!r}, found the same one as {other}"
            )
        elif other != str(where):
            self._twice.append((other, str(where)))

    def judge(self) -> None:
        """After the last one; warns of those that are twice in one part.

        Raises:
            DataError: too many are in two parts.
        """
        if len(self._in_two_parts) > self._few * self._images:
            more = f" ({count} more)" if (count := len(self._in_two_parts) - 1) else ""
            raise DataError(
                f"{self._in_two_parts[0]}{more}; one could be trained on and the other one held out. Take one of them out (of a "
                "folder that is there twice: the folder)"
            )
        if self._in_two_parts:
            warnings.warn(
                f"{self._in_two_parts[0]}: {len(self._in_two_parts)} of {self._images} images, too few to change an accuracy",
                stacklevel=2,
            )
        if self._twice:
            first, second = self._twice[0]
            warnings.warn(
                f"{second} is the same image as {first}; it could be support and query of one task, which makes the accuracy too high. "
                f"Take it out{f', and {count} more' if (count := len(self._twice) - 1) else ''}",
                stacklevel=2,
            )
