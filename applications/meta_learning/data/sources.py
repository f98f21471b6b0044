"""The files of one Omniglot set as they lie on disk: an archive, or the folder that it unpacks to.

Archives are read in place and never unpacked, so no member can be written outside a target; an archive with a member
that tries is refused all the same.
"""

import hashlib
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from applications.meta_learning.data.classes import DataError

MAX_DRAWING_BYTES = 1 << 20  # the official drawings have less than 1 KB each


class Source(Protocol):
    """Where the files of one set come from. Everything raises `DataError` for files that cannot be read."""

    path: Path
    remedy: str  # what the user does when something is wrong with it

    def fingerprint(self) -> str:
        """Changes when the files change; does not depend on where they are."""
        ...

    def names(self) -> list[str]:
        """The PNG files, relative to the folder that holds the set, with forward slashes."""
        ...

    def read(self, names: Sequence[str]) -> Iterator[bytes]:
        """The contents of these files, one after the other."""
        ...


class ArchiveSource:
    """A zip archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.remedy = "move it away and download the official archive (download=True, or --download)"

    def fingerprint(self) -> str:
        """Size and SHA-256 of the archive."""
        with _explained(self), self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return f"archive {file.tell()} {digest}"

    def names(self) -> list[str]:
        """The PNG members, after every member has been found harmless."""
        with _explained(self), zipfile.ZipFile(self.path) as archive:
            members = archive.infolist()
        for member in members:
            reason = _why_refused(member)
            if reason:
                raise DataError(f"{self.path}: refused, its member {member.filename!r} {reason}; {self.remedy}")
        return [member.filename for member in members if _is_drawing(member.filename)]

    def read(self, names: Sequence[str]) -> Iterator[bytes]:
        """The members, each checked against its CRC."""
        with _explained(self), zipfile.ZipFile(self.path) as archive:
            for name in names:
                yield archive.read(name)


class FolderSource:
    """The folder that an archive unpacks to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.remedy = "unpack the official archive again"

    def fingerprint(self) -> str:
        """Hash of the names, sizes and times of all files (reading them all would take as long as decoding them)."""
        digest = hashlib.sha256()
        with _explained(self):
            for name, file in self._files():
                about = file.stat()
                # The change time too: it tells a file that was replaced by one of the same size and age.
                digest.update(
                    f"{name}\0{about.st_size}\0{about.st_mtime_ns}\0{about.st_ctime_ns}\n".encode(
                        errors="surrogateescape"
                    )
                )
        return f"folder {digest.hexdigest()}"

    def names(self) -> list[str]:
        """The PNG files in <alphabet>/<character> folders."""
        with _explained(self):
            return [name for name, _ in self._files()]

    def read(self, names: Sequence[str]) -> Iterator[bytes]:
        """The files."""
        with _explained(self):
            for name in names:
                yield (self.path.parent / name).read_bytes()

    def _files(self) -> list[tuple[str, os.DirEntry[str]]]:
        found = {
            f"{self.path.name}/{alphabet.name}/{character.name}/{file.name}": file
            for alphabet in _entries(self.path)
            if alphabet.is_dir()
            for character in _entries(alphabet.path)
            if character.is_dir()
            for file in _entries(character.path)
        }
        return sorted((name, file) for name, file in found.items() if _is_drawing(name))


def find_source(folder: Path, set_name: str) -> Source | None:
    """The archive of a set if it is in `folder`, otherwise its folder if that is, otherwise None."""
    archive, unpacked = folder / f"{set_name}.zip", folder / set_name
    if os.path.isfile(archive):  # unlike Path.is_file: False, not an error, in a folder that may not be searched
        return ArchiveSource(archive)
    if os.path.isdir(unpacked):
        return FolderSource(unpacked)
    return None


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _is_drawing(name: str) -> bool:
    """A PNG file; not what macOS leaves beside one (__MACOSX/, ._name.png)."""
    parts = name.split("/")
    return name.lower().endswith(".png") and not any(part.startswith((".", "__MACOSX")) for part in parts)


def _why_refused(member: zipfile.ZipInfo) -> str | None:
    name = member.filename
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "has an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "points outside the archive"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a symbolic link"
    if member.flag_bits & 1:
        return "is encrypted"
    if _is_drawing(name) and member.file_size > MAX_DRAWING_BYTES:
        return f"has {member.file_size} bytes, more than any drawing"
    return None


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError) as error:
        raise DataError(
            f"{source.path}: not a complete zip archive, as left by an interrupted download ({error}); {source.remedy}"
        ) from error
    except OSError as error:
        raise DataError(f"{source.path}: could not be read ({error}); {source.remedy}") from error
