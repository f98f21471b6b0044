"""Compositions of ``torch.func``, differentiable again in every mode: for the rules of ``argmin``, ``root`` and ``fixed_point``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel.derivatives.flat import Flat
from bilevel.derivatives.forward import alike, jvp
from bilevel.derivatives.levels import Levels, over_levels


def condition(flat: Flat, levels: Levels) -> Callable[..., Tensor]:
    """``(phi, *tensors) -> condition``; ``levels`` over (phi, *tensors)."""
    return over_levels(flat.condition, levels)


def condition_product(flat: Flat, levels: Levels, transposed: bool) -> Callable[..., Tensor]:
    """``(u, phi, *tensors) -> A u``, or A^T u, with A the derivative of the condition in phi; ``levels`` over (u, phi, *tensors)."""

    def product(u: Tensor, phi: Tensor, *tensors: Tensor) -> Tensor:
        pull = torch.func.vjp(lambda p: flat.condition(p, *tensors), phi)[1]
        if flat.symmetric or transposed:
            return pull(u)[0]
        # A u is the derivative of w -> A^T w, which is linear
        return torch.func.vjp(lambda w: pull(w)[0], torch.zeros_like(phi))[1](u)[0]

    return over_levels(product, levels)


def pullback(
    fn: Callable[..., Tensor], arguments: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The vector-Jacobian product of ``fn`` with respect to the wanted arguments; None for the others."""
    chosen = [i for i, want in enumerate(wanted) if want]
    if not chosen:
        return [None] * len(arguments)

    # vjp's own function may be called once its level is gone, and saved tensors still wear it
    arguments = [torch._C._functorch.unwrap_if_dead(argument) for argument in arguments]
    cotangent = torch._C._functorch.unwrap_if_dead(cotangent)
    products = torch.func.vjp(_of(fn, arguments, chosen), *[arguments[i] for i in chosen])[1](cotangent)
    result: list[Tensor | None] = [None] * len(arguments)
    for i, product in zip(chosen, products, strict=True):
        result[i] = product
    return result


def pushforward(
    fn: Callable[..., Tensor], arguments: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor | None:
    """The Jacobian-vector product of ``fn``; None if every tangent is None."""
    chosen = [i for i, tangent in enumerate(tangents) if tangent is not None]
    if not chosen:
        return None

    arguments = [torch._C._functorch.unwrap_if_dead(argument) for argument in arguments]
    at = tuple(arguments[i].contiguous() for i in chosen)  # a tangent cannot be put beside an expanded tensor
    along = tuple(tangent for tangent in tangents if tangent is not None)
    return alike(*jvp(_of(fn, arguments, chosen), at, along))


def _of(fn: Callable[..., Tensor], arguments: Sequence[Tensor], chosen: Sequence[int]) -> Callable[..., Tensor]:
    """``fn`` as a function of the chosen arguments alone."""

    def of_chosen(*values: Tensor) -> Tensor:
        full = list(arguments)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        return fn(*full)

    return of_chosen
