"""How good a hypergradient is: a rigorous bound where the user states constants, an estimate always, and sentences.

Let phi be the point, H and C the derivatives d2G/dphi2 and d2G/dphi dtheta there, b = dL/dphi, and r = b - H u what the linear
solver left. Stars mark the exact inner solution. With g = dL/dtheta - C^T u as computed, w = H^{-1} b and w* = H*^{-1} b*,

    g* - g = - C^T H^{-1} r + (dL/dtheta* - dL/dtheta) - (C*^T w* - C^T w),

a *linear* part, the first term, and an *inner* part, the rest, which vanishes with delta = |phi - phi*|. ``bound.py`` bounds the two,
``estimate.py`` computes them, both from what ``evaluation.py`` measures at phi.
"""

from bilevel.certificates.certificate import Certificate

__all__ = ["Certificate"]
