"""Work C by hand, in NumPy with the derivatives on paper."""

from __future__ import annotations

import sys

import numpy as np
from fixed import load, serve

ARRAYS = load(sys.argv[1])
A, b, W, target, theta = (ARRAYS[name] for name in ("A", "b", "W", "target", "theta"))
STEP_SIZE, GD_STEPS, CG_STEPS = float(ARRAYS["step_size"]), 100, 5


def hypergradient() -> np.ndarray:
    """dL/dtheta."""
    linear, phi = b + W @ theta, np.zeros_like(b)
    for _ in range(GD_STEPS):
        phi = phi - STEP_SIZE * (A @ phi - linear)
    r = -target / (1 + np.exp(target * phi))
    u, p, rr = np.zeros_like(r), r, r @ r
    for _ in range(CG_STEPS):
        ap = A @ p
        alpha = rr / (p @ ap)
        u, r = u + alpha * p, r - alpha * ap
        rr, before = r @ r, rr
        p = r + rr / before * p
    return 0.1 * theta + W.T @ u


serve(hypergradient, ARRAYS["reference"])
