"""A folder of generated characters: what the examples of few-shot learning do without images of your own."""

from pathlib import Path

from PIL import Image

from applications.meta_learning.data import generate_glyphs


def write_folder(folder: Path, classes: int, images: int, seed: int = 0, size: int = 20) -> None:
    """``folder/<class>/<image>.png``: every image another drawing of the character of its class, moved, turned and sheared."""
    drawn = generate_glyphs(classes, images, seed, size).images  # (classes, images, size, size)
    for number, drawings in enumerate(drawn.numpy()):
        place = folder / f"character{number:03d}"
        place.mkdir(parents=True)
        for k, drawing in enumerate(drawings):
            Image.fromarray(255 - drawing).save(place / f"{k:02d}.png")
