"""Work C for the peers that use PyTorch: G and L as tensors, and the settings that all share."""

from __future__ import annotations

import sys

import torch
from fixed import load

ARRAYS = load(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
A, b, W, target, theta = (torch.from_numpy(ARRAYS[name]) for name in ("A", "b", "W", "target", "theta"))
REFERENCE, STEP_SIZE = ARRAYS["reference"], float(ARRAYS["step_size"])
GD_STEPS, CG_STEPS = 100, 5


def inner(phi: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """G."""
    return 0.5 * phi @ (A @ phi) - (b + W @ theta) @ phi


def outer(phi: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """L."""
    return torch.nn.functional.softplus(-target * phi).sum() + 0.05 * theta @ theta


def start() -> torch.Tensor:
    """Of the inner solve."""
    return torch.zeros_like(b)
