"""The one place that calls autograd.

A *call* of the library is made flat here: phi is one vector ``(*batch, d)``, theta and data are a list of tensors, and
the user's functions of one task are mapped over the batch with ``torch.func.vmap``. Two faces over the same flat
functions:

* :class:`Objective` and :class:`Linearisation`: numbers at base level, with eager autograd and one retained graph
  (fast);
* :func:`condition`, :func:`condition_product`, :func:`pullback`, :func:`pushforward`: compositions of ``torch.func``,
  differentiable again.
"""

from bilevel.derivatives.backward import backward_product
from bilevel.derivatives.flat import TENSOR, Flat
from bilevel.derivatives.forward import alike, jvp
from bilevel.derivatives.functional import condition, condition_product, pullback, pushforward
from bilevel.derivatives.guards import (
    is_dual,
    is_transformed,
    refuse_batched_gradients,
    refuse_captured,
    refuse_captured_under_transforms,
    refuse_eager_forward_mode,
    refuse_nested_forward_mode,
    refuse_writes,
    transforms_active,
    versions,
)
from bilevel.derivatives.levels import Levels, over_levels, with_axis
from bilevel.derivatives.objective import Linearisation, Objective

__all__ = [
    "TENSOR",
    "Flat",
    "Levels",
    "Linearisation",
    "Objective",
    "alike",
    "backward_product",
    "condition",
    "condition_product",
    "is_dual",
    "is_transformed",
    "jvp",
    "over_levels",
    "pullback",
    "pushforward",
    "refuse_batched_gradients",
    "refuse_captured",
    "refuse_captured_under_transforms",
    "refuse_eager_forward_mode",
    "refuse_nested_forward_mode",
    "refuse_writes",
    "transforms_active",
    "versions",
    "with_axis",
]
