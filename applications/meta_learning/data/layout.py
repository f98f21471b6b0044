"""What a complete Omniglot is: the two published sets, and the check that a list of files is one of them."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from applications.meta_learning.data.classes import DataError


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One of the published sets: where its archive is and what it must contain."""

    name: str
    group: str
    alphabets: int
    characters: int
    url: str
    md5: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sets, and what every character in them has: `drawings` drawings of `image_size` x `image_size` pixels."""

    sets: tuple[ImageSet, ...]
    drawings: int
    image_size: int


_LOCATION = "https://github.com/brendenlake/omniglot/raw/master/python"

# Lake, Salakhutdinov, Tenenbaum: Human-level concept learning through probabilistic program induction. Science, 2015.
OFFICIAL = Layout(
    sets=(
        ImageSet(
            name="images_background",
            group="background",
            alphabets=30,
            characters=964,
            url=f"{_LOCATION}/images_background.zip",
            md5="68d2efa1b9178cc56df9314c21c6e718",
        ),
        ImageSet(
            name="images_evaluation",
            group="evaluation",
            alphabets=20,
            characters=659,
            url=f"{_LOCATION}/images_evaluation.zip",
            md5="6b91aef0f799c5bb55b94e3f2daec811",
        ),
    ),
    drawings=20,
    image_size=105,
)


def arrange(names: Sequence[str], image_set: ImageSet, drawings: int, where: Path, remedy: str) -> dict[str, list[str]]:
    """The files of each character, both in order: {"<set>/<alphabet>/characterNN": ["<set>/.../IIII_DD.png", ...]}.

    names: PNG files, relative to the folder that holds the set.
    where, remedy: for the message of the `DataError` that says what is missing or too much.
    """
    pattern = re.compile(rf"({re.escape(image_set.name)}/[^/]+/character\d+)/\d+_(\d+)\.png")
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for name in sorted(names):
        match = pattern.fullmatch(name)
        if match is None:
            expected = f"{image_set.name}/<Alphabet>/characterNN/IIII_DD.png"
            raise DataError(f"{where}: expected files named {expected}, found {name!r}; {remedy}")
        character, drawing = match[1], int(match[2])
        if drawing in found[character]:
            raise DataError(f"{where}: drawing {drawing} of {character} is there twice ({name!r}); {remedy}")
        found[character][drawing] = name
    wanted = set(range(1, drawings + 1))
    for character, files in sorted(found.items()):
        if set(files) != wanted:
            missing, extra = sorted(wanted - set(files)), sorted(set(files) - wanted)
            raise DataError(
                f"{where}: expected the drawings 1 to {drawings} of {character}, "
                f"missing {missing or 'none'}, not expected {extra or 'none'}; {remedy}"
            )
    alphabets = {character.split("/")[1] for character in found}
    if (len(found), len(alphabets)) != (image_set.characters, image_set.alphabets):
        raise DataError(
            f"{where}: expected {image_set.characters} characters of {image_set.alphabets} alphabets, "
            f"found {len(found)} of {len(alphabets)}; {remedy}"
        )
    return {character: [files[i] for i in sorted(files)] for character, files in sorted(found.items())}
