"""The diagonal of A as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.checks import check_count, keep_python_numbers
from bilevel.linsys.base import Matvec, Operator, batch_of, outside_transforms
from bilevel.linsys.preconditioner import Preconditioner


@dataclass(frozen=True, kw_only=True)
class Jacobi(Preconditioner):
    """M = D^{-1} with D the diagonal of A: for variables of very different scales.

    D is exact from d products at once (d^2 memory for each problem), or estimated from a few: with random signs z, the mean of
    z * A z has the expectation D (Bekas, Kokiopoulou and Saad 2007). The estimate of an entry is off by the root of the squared sum
    of its row's other entries over ``num_probes``: good where A is nearly diagonal.

    M must be positive definite. So the absolute value of an entry counts; an estimated entry smaller than its standard error
    counts as that; one that is zero or not finite counts as the mean of the others, or 1 if that is no better.

    Args:
        num_probes: None for the exact diagonal; else the products for the estimate, >= 2.
        seed: of the random signs, which are the same in every call and for every problem of a batch.
    """

    num_probes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_probes is not None:
            check_count("num_probes", self.num_probes, at_least=2)
        check_count("seed", self.seed, at_least=0)
        keep_python_numbers(self)

    def build(self, operator: Operator, b: Tensor) -> tuple[Matvec, int]:
        batch, d = batch_of(operator, b), b.shape[-1]
        if self.num_probes is None:
            probes = torch.eye(d, dtype=b.dtype, device=b.device)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            with outside_transforms():
                signs = 2 * torch.randint(0, 2, (self.num_probes, d), generator=generator, device="cpu") - 1
            probes = signs.to(b)
        probes = probes.reshape(len(probes), *(1,) * len(batch), d).expand(len(probes), *batch, d)
        samples = probes * operator(probes)  # (k, *batch, d)
        if self.num_probes is None:
            size = samples.sum(0).abs()
        else:
            error = samples.std(0) / self.num_probes**0.5
            size = torch.maximum(samples.mean(0).abs(), error)
        usable = size.isfinite() & (size > 0)
        count = usable.sum(-1, keepdim=True).clamp_min(1)
        mean = torch.where(usable, size / count, 0).sum(-1, keepdim=True)
        size = torch.where(usable, size, torch.where(mean > 0, mean, 1.0))
        inverse = 1 / size.clamp_min(torch.finfo(b.dtype).tiny)
        return lambda v: inverse * v, len(probes)
