"""Batches of few-shot tasks by tensor indexing: no loop over tasks, no image decoded.

A sampler draws from a generator of its own on the CPU, so the tasks of a seed are the same on every device, and saving
that generator is all it takes to go on bit for bit.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

TaskBatch = dict[str, dict[str, Tensor]]  # {"support" | "query": {"x" | "y": (tasks, examples, ...)}}


class Sampler(Protocol):
    """What the trainer needs of a source of tasks."""

    def sample(self, num_tasks: int) -> TaskBatch:
        """The next `num_tasks` tasks."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The position in the stream of tasks."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a position that `state_dict` gave."""
        ...


class TaskSampler:
    """N-way K-shot classification tasks from images of classes.

    A task draws `ways` classes without replacement, in random order (the order gives the labels 0 ... ways-1), and
    `shots + query_shots` images of each without replacement. With `rotations`, each class of a task is turned by
    a random multiple of 90 degrees (all its images alike), so what is told apart are (class, rotation) pairs; one class
    is never in a task twice.

    Args:
        images: uint8 (num_classes, drawings, height, width), or with `counts` (images, channels, height, width), class after
            class; the classes in use are copied to `device` once.
        class_indices: the classes to draw from, e.g. `split.train`.
        ways: classes of a task.
        shots: images of each class to adapt to.
        query_shots: images of each class to be judged on.
        rotations: see above.
        seed: the same tasks for the same seed.
        device: where the images are, those in use and those that are handed out.
        dtype: of the images that are handed out.
        counts: images of each class.
    """

    def __init__(
        self,
        images: Tensor,
        class_indices: Sequence[int] | Tensor,
        *,
        ways: int,
        shots: int,
        query_shots: int,
        rotations: bool,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        counts: Sequence[int] | None = None,
    ) -> None:
        indices = _checked_classes(images, class_indices, counts)
        _check_counts(ways=ways, shots=shots, query_shots=query_shots)
        images, sizes = _used(images, indices, counts)
        drawings, (height, width) = int(sizes.min()), images.shape[-2:]
        if ways < 2:
            raise ValueError(f"ways: expected at least 2 classes per task, got {ways}")
        if ways > len(indices):
            raise ValueError(f"ways: expected at most the {len(indices)} classes to draw from, got {ways}")
        if shots + query_shots > drawings:
            raise ValueError(
                f"expected shots + query_shots <= {drawings}, the images of the smallest class (support and query share none), "
                f"got {shots} + {query_shots}"
            )
        if rotations and height != width:
            raise ValueError(f"rotations need square images, got {height} x {width}; use rotations=False")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating type, got {dtype}")
        self._images = images.to(device)
        self._first, self._sizes = sizes.cumsum(0) - sizes, sizes
        self._ways, self._shots, self._query_shots = ways, shots, query_shots
        self._rotations = rotations
        self._dtype = dtype
        self._generator = _generator(seed)

    def sample(self, num_tasks: int) -> TaskBatch:
        """x: `dtype` in [0, 1], (tasks, ways*shots, channels, height, width), class by class; y: int64 (tasks, ways*shots)."""
        _check_counts(num_tasks=num_tasks)
        image = self._images.shape[1:]
        per_class, largest = self._shots + self._query_shots, int(self._sizes.max())
        # The largest of independent uniform scores: a random choice without replacement, in random order.
        classes = self._scores(num_tasks, len(self._sizes)).topk(self._ways).indices
        scores = self._scores(num_tasks, self._ways, largest)
        missing = torch.arange(largest) >= self._sizes[classes].unsqueeze(
            -1
        )  # a smaller class has fewer to choose from
        chosen = scores.masked_fill_(missing, -1).topk(per_class).indices
        rows = self._first[classes].unsqueeze(-1) + chosen  # (tasks, ways, per_class)
        x = self._images.index_select(0, _sent(rows.flatten(), self._images.device))
        x = x.view(num_tasks * self._ways, per_class, *image)
        if self._rotations:
            quarters = torch.randint(4, (num_tasks * self._ways,), generator=self._generator)
            x = _rotate(x, _sent(quarters, x.device))
        x = x.view(num_tasks, self._ways, per_class, *image)
        labels = torch.arange(self._ways, device=x.device)

        def examples(part: Tensor) -> dict[str, Tensor]:  # part: (tasks, ways, shots, channels, height, width)
            y = labels.repeat_interleave(part.shape[2]).repeat(num_tasks, 1)
            return {"x": part.to(self._dtype).div_(255).view(num_tasks, -1, *image), "y": y}

        return {"support": examples(x[:, :, : self._shots]), "query": examples(x[:, :, self._shots :])}

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the generator (uint8 on the CPU)."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on after the last task that was drawn before `state_dict`."""
        _load_generator(self._generator, state)

    def _scores(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator)


class SinusoidSampler:
    """Regression y = a sin(x - p): a from [0.1, 5], p from [0, pi], x from [-5, 5], all uniform (Finn et al. 2017).

    Drawn in float64 and rounded to `dtype` at the end, so float32 and float64 runs see the same tasks.
    """

    def __init__(
        self, *, shots: int, query_shots: int, seed: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> None:
        _check_counts(shots=shots, query_shots=query_shots)
        self._shots, self._query_shots = shots, query_shots
        self._device, self._dtype = device, dtype
        self._generator = _generator(seed)

    def sample(self, num_tasks: int) -> TaskBatch:
        """x, y: `dtype`, (tasks, shots, 1)."""
        _check_counts(num_tasks=num_tasks)
        amplitude = self._uniform(0.1, 5.0, num_tasks, 1, 1)
        phase = self._uniform(0.0, math.pi, num_tasks, 1, 1)
        x = self._uniform(-5.0, 5.0, num_tasks, self._shots + self._query_shots, 1)
        y = amplitude * torch.sin(x - phase)
        x, y = (_sent(tensor.to(self._dtype), self._device) for tensor in (x, y))
        return {
            "support": {"x": x[:, : self._shots], "y": y[:, : self._shots]},
            "query": {"x": x[:, self._shots :], "y": y[:, self._shots :]},
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the generator (uint8 on the CPU)."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on after the last task that was drawn before `state_dict`."""
        _load_generator(self._generator, state)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self._generator, dtype=torch.float64)


def _sent(x: Tensor, device: torch.device | str) -> Tensor:
    """On the device. A copy from pinned memory does not make the host wait for what the GPU still has to do."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def _rotate(x: Tensor, quarters: Tensor) -> Tensor:
    """`numpy.rot90(x[i], quarters[i], axes=(-2, -1))` for every i, one bit of `quarters` at a time."""
    x = _choose(x, x.flip(-2, -1), quarters // 2)
    return _choose(x, x.rot90(1, (-2, -1)), quarters % 2)


def _choose(first: Tensor, second: Tensor, which: Tensor) -> Tensor:
    """first[i] where which[i] is 0, second[i] where it is 1; several times as fast as `torch.where` on uint8 images."""
    here = torch.arange(len(first), device=first.device)
    return torch.cat([first, second]).index_select(0, which * len(first) + here)


def _used(images: Tensor, indices: Tensor, counts: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """The images of these classes, (images, channels, height, width), and how many each class has."""
    if counts is None:
        drawings = images[indices]
        return drawings.flatten(0, 1).unsqueeze(1), torch.full((len(indices),), images.shape[1])
    sizes = torch.as_tensor(counts)
    first = sizes.cumsum(0) - sizes
    rows = [torch.arange(int(first[i]), int(first[i] + sizes[i])) for i in indices]
    return images[torch.cat(rows)], sizes[indices]


def _checked_classes(images: Tensor, class_indices: Sequence[int] | Tensor, counts: Sequence[int] | None) -> Tensor:
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor (the .images of ImageClasses), got {type(images).__name__}")
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images: expected uint8 (num_classes, drawings, height, width), got {images.dtype} {tuple(images.shape)}"
        )
    if len(class_indices) == 0:
        raise ValueError("class_indices: expected at least one class, got none")
    indices = torch.as_tensor(class_indices)
    if indices.dtype != torch.int64 or indices.ndim != 1:
        raise ValueError(f"class_indices: expected a list of int, got {indices.dtype} of shape {tuple(indices.shape)}")
    if len(indices.unique()) != len(indices):
        raise ValueError(
            "class_indices: expected every class once; one that is there twice could meet itself in a task"
        )
    if counts is not None and sum(counts) != len(images):
        raise ValueError(f"counts: expected numbers that add up to the {len(images)} images, got {sum(counts)}")
    num_classes = len(images) if counts is None else len(counts)
    outside = indices[(indices < 0) | (indices >= num_classes)]
    if len(outside):
        raise ValueError(
            f"class_indices: expected 0 to {num_classes - 1} ({num_classes} classes), got {int(outside[0])}; "
            "does the split belong to this data set?"
        )
    return indices.to(images.device)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {count!r}")


def _generator(seed: int) -> torch.Generator:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {seed!r}")
    return torch.Generator().manual_seed(seed)


def _load_generator(generator: torch.Generator, state: dict[str, Tensor]) -> None:
    value = state.get("generator") if isinstance(state, dict) else None
    expected = generator.get_state()
    if not isinstance(value, Tensor) or value.dtype != expected.dtype or value.shape != expected.shape:
        raise ValueError(
            f"expected a state that state_dict() gave, {{'generator': uint8 tensor of {len(expected)} bytes}}, "
            f"got {state!r:.80}"
        )
    generator.set_state(value.cpu())
