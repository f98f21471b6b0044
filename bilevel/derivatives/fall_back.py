"""What stands for a product where an operator of the problem lacks the derivative that it needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from bilevel.curvature import FiniteDifference, ForwardOverReverse, HessianProduct, ReverseOverReverse

_logger = logging.getLogger(__name__)

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
