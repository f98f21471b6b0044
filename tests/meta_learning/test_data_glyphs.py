import hashlib

import numpy as np
import pytest
import torch

from applications.meta_learning.data import TaskSampler, generate_glyphs
from applications.meta_learning.data.glyphs import _ink


def test_shape_names_and_type():
    glyphs = generate_glyphs(7, 3, seed=0, size=20)
    assert glyphs.images.shape == (7, 3, 20, 20) and glyphs.images.dtype == torch.uint8
    assert len(set(glyphs.names)) == 7
    assert set(glyphs.groups) == {"glyphs"}


def test_the_seed_gives_these_bytes_on_every_platform():
    """Recorded on x86-64 Linux. Raise FORMAT in glyphs.py when a change of the drawings is wanted."""
    digest = hashlib.sha256(generate_glyphs(30, 5, seed=1).images.numpy().tobytes()).hexdigest()
    assert digest == "e2d0f39706fdbd4c4887010072bdfd625b511e0ec65e27cdcdc40bbe656929c6"


def test_only_the_arguments_decide():
    np.random.seed(1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate_glyphs(9, 4, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    np.random.seed(2)
    again = generate_glyphs(9, 4, seed=5)
    assert torch.equal(first.images, again.images) and first.source_key == again.source_key
    other = generate_glyphs(9, 4, seed=6)
    assert not torch.equal(first.images, other.images) and first.source_key != other.source_key


def test_every_drawing_has_ink_and_ground_and_grey_edges():
    images = generate_glyphs(100, 10, seed=0).images.flatten(2).float()
    full, none = (images == 255).float().mean(-1), (images == 0).float().mean(-1)
    assert full.min() > 0.005 and full.max() < 0.5
    assert none.min() > 0.3
    assert (full + none).mean() < 0.95  # the rest is grey: edges are not jagged


def test_no_two_drawings_are_the_same():
    images = generate_glyphs(60, 20, seed=2).images.flatten(0, 1).flatten(1)
    assert len(images.unique(dim=0)) == 60 * 20


def test_classes_are_alike_inside_and_not_trivially_apart():
    """Nearest neighbour on pixels, 5-way 1-shot (chance 20 %): there is a class to see, and something left to learn."""
    images = generate_glyphs(200, 20, seed=3).images
    sampler = TaskSampler(images, range(200), ways=5, shots=1, query_shots=5, rotations=True, seed=0, device="cpu")
    tasks = sampler.sample(300)
    distance = torch.cdist(tasks["query"]["x"].flatten(2), tasks["support"]["x"].flatten(2))
    guess = tasks["support"]["y"].gather(1, distance.argmin(-1))
    accuracy = (guess == tasks["query"]["y"]).float().mean()
    assert 0.4 < accuracy < 0.7


def test_ink_is_the_distance_to_the_curve():
    """Against the distance to a fine sampling of the Bezier curve in float64."""
    random = np.random.default_rng(0)
    size, radius = 28, np.array([0.06, 0.08], dtype=np.float32)
    curves = random.uniform(-0.8, 0.8, size=(2, 3, 4, 2)).astype(np.float32)
    t = np.linspace(0, 1, 5000)
    basis = np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
    centres = (np.arange(size) + 0.5) * 2 / size - 1
    for image, strokes, r in zip(_ink(curves, radius, size), curves.astype(float), radius, strict=True):
        points = np.einsum("sid,it->std", strokes, basis).reshape(-1, 2)
        column, row = np.meshgrid(centres, centres)
        nearest = np.sqrt(((row[..., None] - points[:, 1]) ** 2 + (column[..., None] - points[:, 0]) ** 2).min(-1))
        expected = 255 * np.clip((r - nearest) * size / 2 + 0.5, 0, 1)
        # The library samples 64 points per stroke: up to 0.15 of full ink less between two of them.
        assert np.abs(image - expected).max() < 0.15 * 255
        assert np.abs(image - expected).mean() < 0.01 * 255


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 0), "num_classes: expected an integer >= 1, got 0"),
        ((5, 0, 0), "drawings_per_class: expected an integer >= 1, got 0"),
        ((5, 5, -1), "seed: expected an integer >= 0, got -1"),
        ((5, 5, 0, 4), "size: expected an integer >= 8, got 4"),
        ((5, 5.0, 0), "drawings_per_class: expected an integer >= 1, got 5.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_glyphs(*arguments)
