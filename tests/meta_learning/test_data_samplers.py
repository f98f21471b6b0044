"""Samplers against numpy.rot90, closed forms and the statistics of a uniform choice."""

import io
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from applications.meta_learning.data import ImageClasses, Sampler, SinusoidSampler, TaskSampler, generate_glyphs
from applications.meta_learning.data.samplers import _rotate

NUM_CLASSES, DRAWINGS, SIZE = 12, 7, 4


def marked_images():
    """Images that say which class and drawing they are, and, by the corner where they say it, how they are turned."""
    images = torch.zeros(NUM_CLASSES, DRAWINGS, SIZE, SIZE, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(1, NUM_CLASSES + 1, dtype=torch.uint8)[:, None]
    images[:, :, 0, 1] = torch.arange(101, DRAWINGS + 101, dtype=torch.uint8)
    return images


def task_sampler(**changes):
    options = {"ways": 3, "shots": 2, "query_shots": 4, "rotations": True, "seed": 0, "device": "cpu"} | changes
    indices = options.pop("class_indices", range(NUM_CLASSES))
    return TaskSampler(options.pop("images", marked_images()), indices, **options)


def identify(batch):
    """(tasks, ways, shots, 3): class, drawing and quarter turns of every example, by look-up of numpy's rotations."""
    images = marked_images().numpy()
    table = {
        np.rot90(images[c, d], k).tobytes(): (c, d, k)
        for c in range(NUM_CLASSES)
        for d in range(DRAWINGS)
        for k in range(4)
    }
    assert len(table) == NUM_CLASSES * DRAWINGS * 4
    pixels = (batch["x"] * 255).round().to(torch.uint8).numpy()
    return np.array([[table[example[0].tobytes()] for example in task] for task in pixels])


def equal(a, b):
    return all(torch.equal(a[part][key], b[part][key]) for part in ("support", "query") for key in ("x", "y"))


# --- classification tasks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_types_and_range(dtype):
    images = generate_glyphs(6, 5, seed=0, size=28).images
    sampler = TaskSampler(
        images, [0, 2, 3, 5], ways=3, shots=1, query_shots=2, rotations=True, seed=0, device="cpu", dtype=dtype
    )
    batch = sampler.sample(4)
    assert set(batch) == {"support", "query"}
    for part, shots in (("support", 1), ("query", 2)):
        x, y = batch[part]["x"], batch[part]["y"]
        assert x.shape == (4, 3 * shots, 1, 28, 28) and x.dtype == dtype
        assert y.shape == (4, 3 * shots) and y.dtype == torch.int64
        assert x.min() == 0 and x.max() == 1
        for task in y.tolist():
            assert Counter(task) == dict.fromkeys(range(3), shots)


def test_every_task_is_a_task():
    """Labels, rotations and drawings of 200 tasks: one (character, rotation) per label, no drawing used twice."""
    batch = task_sampler().sample(200)
    support, query = identify(batch["support"]), identify(batch["query"])
    for task in range(200):
        examples = [
            *zip(batch["support"]["y"][task].tolist(), support[task].tolist(), strict=True),
            *zip(batch["query"]["y"][task].tolist(), query[task].tolist(), strict=True),
        ]
        class_of_label = {}
        for label, (character, _, quarters) in examples:
            assert class_of_label.setdefault(label, (character, quarters)) == (character, quarters)
        assert set(class_of_label) == {0, 1, 2}
        assert len({character for character, _ in class_of_label.values()}) == 3
        drawings = [(character, drawing) for _, (character, drawing, _) in examples]
        assert len(set(drawings)) == len(drawings) == 3 * (2 + 4)


def test_rotations_are_those_of_numpy():
    images = torch.randint(256, (8, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    quarters = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    turned = _rotate(images, quarters)
    for image, k, result in zip(images, quarters.tolist(), turned, strict=True):
        np.testing.assert_array_equal(result.numpy(), np.rot90(image.numpy(), k, axes=(-2, -1)))


def test_without_rotations_no_image_is_turned():
    assert not identify(task_sampler(rotations=False).sample(50)["support"])[..., 2].any()


def test_all_drawings_of_a_class_can_be_used():
    found = identify(task_sampler(shots=3, query_shots=4).sample(20)["query"])
    assert set(found[..., 1].flatten()) == set(range(DRAWINGS))


def test_classes_outside_the_given_ones_never_appear():
    wanted = [1, 4, 6, 11]
    for indices in (wanted, tuple(wanted), torch.tensor(wanted)):
        found = identify(task_sampler(class_indices=indices).sample(100)["query"])
        assert set(found[..., 0].flatten()) == set(wanted)


def uniform_p_value(values, num):
    counts = np.bincount(np.asarray(values).flatten(), minlength=num)
    assert len(counts) == num
    return stats.chisquare(counts).pvalue


def test_characters_labels_rotations_and_drawings_are_uniform():
    tasks = 4000
    found = identify(task_sampler(ways=2, shots=1, query_shots=1, seed=3).sample(tasks)["support"])
    first, second = found[:, 0], found[:, 1]
    # Each label by itself: a character is as likely to be label 0 as label 1. 1e-3: the seed is fixed.
    for label in (first, second):
        assert uniform_p_value(label[:, 0], NUM_CLASSES) > 1e-3
        assert uniform_p_value(label[:, 1], DRAWINGS) > 1e-3
        assert uniform_p_value(label[:, 2], 4) > 1e-3
    # Ordered pairs of different characters, and pairs of rotations.
    others = second[:, 0] - (second[:, 0] > first[:, 0])
    assert uniform_p_value(first[:, 0] * (NUM_CLASSES - 1) + others, NUM_CLASSES * (NUM_CLASSES - 1)) > 1e-3
    assert uniform_p_value(first[:, 2] * 4 + second[:, 2], 16) > 1e-3


def test_pairs_of_support_and_query_drawings_are_uniform():
    batch = task_sampler(ways=2, shots=1, query_shots=1, seed=4).sample(4000)
    support, query = identify(batch["support"])[..., 1], identify(batch["query"])[..., 1]
    others = query - (query > support)
    assert uniform_p_value(support * (DRAWINGS - 1) + others, DRAWINGS * (DRAWINGS - 1)) > 1e-3


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [task_sampler, lambda: SinusoidSampler(shots=2, query_shots=3, seed=0, device="cpu")])
def test_the_number_of_operations_does_not_grow_with_the_number_of_tasks(make):
    counts = []
    for num_tasks in (1, 300):
        sampler = make()
        with CountOperations() as mode:
            sampler.sample(num_tasks)
        counts.append(mode.count)
    assert counts[0] == counts[1] > 0


def test_the_images_are_neither_changed_nor_kept():
    images = marked_images()
    sampler = task_sampler(images=images)
    expected = task_sampler().sample(5)
    assert torch.equal(images, marked_images())
    images.zero_()
    assert equal(sampler.sample(5), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_tasks_of_a_seed_are_the_same_on_every_device():
    for make in (task_sampler, lambda **o: SinusoidSampler(shots=2, query_shots=3, **{"seed": 0, "device": "cpu"} | o)):
        here, there = make().sample(6), make(device="cuda").sample(6)
        for part in ("support", "query"):
            for key in ("x", "y"):
                assert there[part][key].device.type == "cuda"
                # x / 255 may differ by rounding between the devices
                torch.testing.assert_close(there[part][key].cpu(), here[part][key], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ways": 13}, ValueError, r"ways: expected at most the 12 classes to draw from, got 13"),
        ({"ways": 1}, ValueError, r"ways: expected at least 2 classes per task, got 1"),
        ({"ways": 2.0}, ValueError, r"ways: expected an integer >= 1, got 2.0"),
        (
            {"shots": 4},
            ValueError,
            r"expected shots \+ query_shots <= 7, the images of the smallest class .* got 4 \+ 4",
        ),
        ({"shots": 0}, ValueError, r"shots: expected an integer >= 1, got 0"),
        ({"query_shots": -1}, ValueError, r"query_shots: expected an integer >= 1, got -1"),
        ({"seed": -1}, ValueError, r"seed: expected an integer from 0 to 2\*\*63 - 1, got -1"),
        (
            {"class_indices": [0, 1, 12]},
            ValueError,
            r"class_indices: expected 0 to 11 \(12 classes\), got 12; does the",
        ),
        ({"class_indices": [-1, 0, 1]}, ValueError, r"class_indices: expected 0 to 11 \(12 classes\), got -1"),
        ({"class_indices": [0, 1, 1, 2]}, ValueError, r"class_indices: expected every class once"),
        ({"class_indices": [0.5, 1.0]}, ValueError, r"class_indices: expected a list of int, got torch.float32"),
        ({"class_indices": []}, ValueError, r"class_indices: expected at least one class"),
        (
            {"images": torch.zeros(3, 7, 4, 4)},
            ValueError,
            r"images: expected uint8 .* got torch.float32 \(3, 7, 4, 4\)",
        ),
        (
            {"images": torch.zeros(12, 7, 4, 5, dtype=torch.uint8)},
            ValueError,
            r"rotations need square images, got 4 x 5",
        ),
        ({"dtype": torch.uint8}, ValueError, r"dtype: expected a floating type, got torch.uint8"),
    ],
)
def test_wrong_options_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        task_sampler(**changes)


def test_image_classes_in_place_of_images_are_explained():
    classes = ImageClasses(images=marked_images(), names=("a",) * 12, groups=("b",) * 12, source_key="")
    with pytest.raises(TypeError, match=r"expected a tensor \(the .images of ImageClasses\), got ImageClasses"):
        task_sampler(images=classes)


# --- both ------------------------------------------------------------------------------------------------------------


def sinusoid_sampler(**changes):
    return SinusoidSampler(**{"shots": 5, "query_shots": 10, "seed": 0, "device": "cpu"} | changes)


MAKERS = pytest.mark.parametrize("make", [task_sampler, sinusoid_sampler])


@MAKERS
def test_resumed_sampling_is_bit_identical(make):
    sampler: Sampler = make(seed=5)
    sampler.sample(3)
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    expected = [sampler.sample(n) for n in (4, 1, 7)]

    file.seek(0)
    resumed = make(seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(equal(resumed.sample(n), batch) for n, batch in zip((4, 1, 7), expected, strict=True))


@MAKERS
def test_a_saved_state_does_not_move_on_with_the_sampler(make):
    sampler = make()
    state = sampler.state_dict()
    first = sampler.sample(3)
    sampler.load_state_dict(state)
    assert equal(sampler.sample(3), first)


@MAKERS
def test_the_seed_alone_decides(make):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(seed=8).sample(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(make(seed=8).sample(4), first)
    assert not torch.equal(make(seed=9).sample(4)["support"]["x"], first["support"]["x"])


@MAKERS
@pytest.mark.parametrize("num_tasks", [0, -1, 1.5, True])
def test_a_wrong_number_of_tasks_is_refused(make, num_tasks):
    with pytest.raises(ValueError, match=f"num_tasks: expected an integer >= 1, got {num_tasks}"):
        make().sample(num_tasks)


@MAKERS
@pytest.mark.parametrize("state", [{}, {"generator": torch.zeros(3, dtype=torch.uint8)}, {"generator": 4}, None])
def test_a_state_from_elsewhere_is_refused(make, state):
    sampler = make()
    with pytest.raises(ValueError, match=r"expected a state that state_dict\(\) gave"):
        sampler.load_state_dict(state)
    assert equal(sampler.sample(2), make().sample(2))


# --- sinusoids -------------------------------------------------------------------------------------------------------


def recover(batch):
    """Amplitude and phase of each task from its points: y = u sin x + v cos x is linear in u and v."""
    found = []
    for x, y in zip(batch["x"][..., 0].numpy(), batch["y"][..., 0].numpy(), strict=True):
        (u, v), residual, _, _ = np.linalg.lstsq(np.stack([np.sin(x), np.cos(x)], axis=1), y, rcond=None)
        assert residual.item() < 1e-20
        found.append((math.hypot(u, v), math.atan2(-v, u)))
    return np.array(found)


def test_sinusoids_are_those_of_the_paper():
    batch = sinusoid_sampler(dtype=torch.float64).sample(2000)
    assert batch["support"]["x"].shape == batch["support"]["y"].shape == (2000, 5, 1)
    assert batch["query"]["x"].shape == batch["query"]["y"].shape == (2000, 10, 1)
    support, query = recover(batch["support"]), recover(batch["query"])
    np.testing.assert_allclose(support, query, atol=1e-9)  # one function per task
    amplitude, phase = query.T
    assert stats.kstest(amplitude, stats.uniform(0.1, 4.9).cdf).pvalue > 1e-3
    assert stats.kstest(phase, stats.uniform(0, math.pi).cdf).pvalue > 1e-3
    x = torch.cat([batch["support"]["x"], batch["query"]["x"]], 1).flatten().numpy()
    assert stats.kstest(x, stats.uniform(-5, 10).cdf).pvalue > 1e-3
    assert x.min() >= -5 and x.max() <= 5


def test_float32_sinusoids_are_the_float64_ones_rounded():
    single, double = sinusoid_sampler().sample(4), sinusoid_sampler(dtype=torch.float64).sample(4)
    assert torch.equal(single["query"]["y"], double["query"]["y"].float())
    assert torch.equal(single["support"]["x"], double["support"]["x"].float())


@pytest.mark.parametrize("option", ["shots", "query_shots"])
def test_wrong_numbers_of_points_are_refused(option):
    with pytest.raises(ValueError, match=f"^{option}: expected an integer >= 1, got 0"):
        sinusoid_sampler(**{option: 0})
