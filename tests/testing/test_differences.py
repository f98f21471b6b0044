"""Extrapolated differences: right within their own uncertainty, and uncertain where they must be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bilevel.testing.differences import Differences, difference, directions

F64, F32 = torch.float64, torch.float32


def at(f: Callable[[Tensor], Tensor], x: float, size: float, dtype: torch.dtype = F64) -> tuple[float, float]:
    point = torch.tensor(x, dtype=dtype)
    value = f(point)
    noise = torch.finfo(dtype).eps * float(value.norm())
    slope, uncertainty = difference(lambda t: f(point + t), size, value, noise)
    return float(slope), uncertainty


FUNCTIONS = {
    "exp": (torch.exp, math.exp),
    "sin": (torch.sin, math.cos),
    "fifth power": (lambda x: x**5, lambda x: 5 * x**4),
    "steep": (lambda x: torch.tanh(30 * x), lambda x: 30 / math.cosh(30 * x) ** 2),
    "wave": (lambda x: torch.sin(40 * x), lambda x: 40 * math.cos(40 * x)),
    "large constant": (lambda x: 1e6 + torch.sin(x), math.cos),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@given(x=st.floats(-2, 2), dtype=st.sampled_from([F64, F32]))
def test_the_error_is_within_the_uncertainty(name: str, x: float, dtype: torch.dtype) -> None:
    f, exact = FUNCTIONS[name]
    x = float(torch.tensor(x, dtype=dtype))
    slope, uncertainty = at(f, x, 1.0, dtype)
    # the last bits of tanh, sin and exp are not correct to half a unit
    assert abs(slope - exact(x)) <= 2 * uncertainty
    if dtype == F64 and name != "large constant":
        assert uncertainty <= 1e-5 * max(1, abs(exact(x)))


def test_smooth_functions_are_differentiated_to_many_digits_with_few_values() -> None:
    points = []

    def counted(x: Tensor) -> Tensor:
        points.append(float(x))
        return x.exp()

    slope, uncertainty = at(counted, 0.3, 1.0)
    assert abs(slope - math.exp(0.3)) < 1e-10 and uncertainty < 1e-7
    assert len(points) <= 1 + 2 * 3  # three levels of steps: extrapolated twice, and the last only to know the error
    assert abs((math.exp(points[1]) - math.exp(points[2])) / (points[1] - points[2]) - math.exp(0.3)) > 1e-5


@pytest.mark.parametrize("offset", [0.0, 1e-12, 1e-9])
@pytest.mark.parametrize("bend", [1.0, 1e-3])
def test_at_a_kink_every_slope_between_both_sides_is_within_the_uncertainty(bend: float, offset: float) -> None:
    """x^2 + x + bend |x - offset|: the slopes at 0 are 1 - bend and 1 + bend."""
    slope, uncertainty = at(lambda x: x + x**2 + bend * (x - offset).abs(), 0.0, 1.0)
    assert slope - uncertainty <= 1 - 0.99 * bend and slope + uncertainty >= 1 + 0.99 * bend
    assert uncertainty < 2.5 * bend


def test_a_kink_beside_the_point_does_no_harm() -> None:
    slope, uncertainty = at(lambda x: x + (x - 1e-4).abs(), 0.0, 1.0)
    assert slope == pytest.approx(0.0, abs=1e-9) and uncertainty < 1e-7


def test_a_jump_leaves_no_number() -> None:
    assert at(lambda x: x + (x > 0), 0.0, 1.0)[1] > 1


def test_steps_shrink_to_where_the_function_is_defined() -> None:
    slope, uncertainty = at(torch.log, 1e-3, 1.0)  # log of a negative number is NaN
    assert slope == pytest.approx(1e3, rel=1e-6) and uncertainty < 1e-2
    slope, uncertainty = at(lambda x: x * torch.nan, 0.0, 1.0)
    assert math.isnan(slope) and uncertainty == math.inf


def test_noise_makes_the_uncertainty_large() -> None:
    generator = np.random.default_rng(0)
    slope, uncertainty = at(lambda x: x + 1e-4 * float(generator.standard_normal()), 0.0, 1.0)
    assert abs(slope - 1) <= 2 * uncertainty and uncertainty > 1e-4


@pytest.mark.parametrize("lengths", [[3, 4], [200, 100], [40] * 20])
def test_directions_measure_a_vector(lengths: list[int]) -> None:
    """sum_k weight_k (e . v_k)^2 is |e|^2, exactly for all coordinates and about so for random directions."""
    e = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(1), dtype=F64)
    along = directions(e, lengths, [f"leaf {i}" for i in range(len(lengths))], [1.0] * len(lengths))
    measured = float((along.weights * (along.vectors @ e).square()).sum() / e.square().sum())
    assert measured == pytest.approx(1.0, abs=1e-12 if len(e) <= 50 else 0.5)
    again = directions(e, lengths, [f"leaf {i}" for i in range(len(lengths))], [1.0] * len(lengths))
    assert torch.equal(along.vectors, again.vectors)
    if len(lengths) <= 16:  # each direction moves one leaf
        for v, name in zip(along.vectors, along.names, strict=True):
            moved = {i for i, part in enumerate(v.split(lengths)) if part.any()}
            assert moved == {int(name.removeprefix("leaf "))}


@pytest.mark.parametrize("lengths", [[2, 3], [70, 80]])
def test_the_gap_of_a_jacobian_is_that_of_its_entries(lengths: list[int]) -> None:
    """f(x) = A sin(x), and a Jacobian with an error in the second leaf."""
    generator, n = torch.Generator().manual_seed(2), sum(lengths)
    a, x = torch.randn(4, n, generator=generator, dtype=F64), torch.randn(n, generator=generator, dtype=F64)
    jacobian, wrong = a * x.cos(), torch.zeros(4, n, dtype=F64)
    wrong[:, lengths[0] :] = 0.1 * torch.randn(4, lengths[1], generator=generator, dtype=F64)
    found = Differences.of(lambda x: a @ x.sin(), x, directions(x, lengths, ["first", "second"], [1.0, 1.0]))
    right = found.gap(jacobian)
    assert right.error <= right.uncertainty and right.relative[1] < 1e-6
    gap = found.gap(jacobian + wrong)
    assert gap.where == "second"
    tolerance = 1e-6 if n <= 50 else 0.5
    assert gap.error == pytest.approx(float(wrong.norm()), rel=tolerance)
    assert gap.size == pytest.approx(float(jacobian.norm()), rel=tolerance)
