"""What stands for a product where an operator of the problem lacks the derivative that it needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from bilevel.curvature import FiniteDifference, ForwardOverReverse, HessianProduct, ReverseOverReverse

_logger = logging.getLogger(__name__)
R = TypeVar("R")

FALL_BACK: tuple[HessianProduct, ...] = (ReverseOverReverse(), ForwardOverReverse(), FiniteDifference())

OF_A_MODEL: tuple[HessianProduct, ...] = (ForwardOverReverse(), ReverseOverReverse(), FiniteDifference())
"""The same for the Jacobian of a model: one forward pass with tangents, two reverse passes, a difference of two outputs."""

HINT = " torch.nn.attention.sdpa_kernel(SDPBackend.MATH) around the model allows exact products."


def is_missing(error: Exception) -> bool:
    """Whether PyTorch says that an operator lacks this derivative."""
    words = str(error)
    if isinstance(
        error, AssertionError
    ):  # PyTorch's own, of an autograd.Function without jvp under vmap; else the user's
        return "flat_bdims" in words
    return isinstance(error, NotImplementedError) or "not implemented" in words or "not support" in words


class FallBack:
    """The way in which products are taken: the one that was asked for, or the next in order that the operators of a problem allow.

    Args:
        asked: the first to try.
        order: what comes after which.
        what: for the log.
        fallen, key: ``fallen[key]`` is where a call of the library keeps what it has fallen back to.
        said: what the log has been told of this problem.
    """

    def __init__(
        self,
        asked: HessianProduct,
        order: Sequence[HessianProduct],
        what: str,
        fallen: dict[Any, HessianProduct],
        key: Any,
        said: set[str],
    ) -> None:
        self._order, self._what, self._fallen, self._key, self._said = order, what, fallen, key, said
        self.product = fallen.get(key, asked)

    @property
    def exact(self) -> bool:
        """Whether all products so far were exact but for rounding."""
        return not isinstance(self.product, FiniteDifference)

    def __call__(self, fn: Callable[[Tensor], R], v: Tensor) -> R:
        """``fn(v)``, which goes the way of :attr:`product`."""
        while True:
            try:
                return fn(v)
            except (NotImplementedError, RuntimeError, AssertionError) as error:
                following = next_after(self.product, error, self._order, self._what, self._said)
                if following is None:
                    raise
                self.product = self._fallen[self._key] = following


def next_after(
    product: HessianProduct, error: Exception, order: Sequence[HessianProduct], what: str, said: set[str]
) -> HessianProduct | None:
    """What to try where an operator lacks what ``product`` needs; None: there is nothing left. The log says it once: what it has said
    is in ``said``.
    """
    kinds = [type(other) for other in order]
    following = order[kinds.index(type(product)) + 1 :]
    if not following or not is_missing(error):
        return None
    words = f"{what}: {product} cannot be used here, going on with {following[0]}"
    if words not in said:
        said.add(words)
        level = (
            logging.INFO if isinstance(following[0], ReverseOverReverse) else logging.WARNING
        )  # as exact, and little slower
        reason = "".join(str(error).splitlines()[:1])[:200]
        _logger.log(level, "%s (%s).%s", words, reason, HINT if "attention" in reason else "")
    return following[0]
