"""What the paper proves about the accuracy and the cost of a hypergradient, as functions with its symbols.

Rajeswaran, Finn, Kakade and Levine 2019, section 3.2 and appendices B and E. For one task, with Euclidean norms:

- ``lam``: ``G(phi, theta) = L_train(phi) + lam/2 |phi - theta|^2`` has the minimiser ``phi*`` (Eq. 4);
- ``mu``: G is mu-strongly convex in phi (Assumption 2.2);
- ``kappa``: ``beta / mu``, where G is beta-smooth in phi (Assumption 2.2);
- ``rho``: the Hessian of L_train is rho-Lipschitz (Assumption 2.3);
- ``B``, ``L``: the outer loss is B-Lipschitz, and its gradient L-Lipschitz (Assumption 2.1);
- ``D``: ``|phi*| <= D`` (Assumption 2.4);
- ``delta``: ``|phi - phi*| <= delta`` for the point phi that the inner solver found (Definition 1);
- ``delta_prime``: ``|g - (I + H_train/lam)^-1 dL/dphi| <= delta_prime`` at that phi, for the gradient g that the linear solver gave
  (Definition 2);
- ``eps``: the accuracy that is asked for, absolute.

The functions take and return plain numbers. Where the paper is stricter or laxer than its proof needs, the docstring says so.
"""

from __future__ import annotations

import math
from numbers import Integral, Real


def agd_iterations(kappa: float, delta: float, x_norm: float) -> int:
    """Lemma 2: gradients after which Nesterov's method, started at 0, is within ``delta`` of the minimiser ``x*``.

    That is ``2 sqrt(kappa) log(2 kappa |x*| / delta)``, rounded up; 0 where the logarithm is negative, because 0 is close enough then.
    The method is the one for strongly convex functions, with step ``1/beta`` and momentum ``(sqrt(kappa) - 1) / (sqrt(kappa) + 1)``:
    ``NesterovAGD(step_size=1 / beta, strong_convexity=mu)``. The rate that it rests on (Bubeck 2015, Theorem 3.18) gives
    ``sqrt(kappa + 1)`` in place of ``2 kappa``, so the printed number is safe: about ``sqrt(kappa) log(4 kappa)`` more than that.

    Args:
        kappa: condition number, >= 1.
        delta: wanted distance, > 0.
        x_norm: ``|x*|``, or a bound of it. For a start ``x_0`` other than 0: a bound of ``|x* - x_0|``, such as
            ``|gradient at x_0| / mu``.

    Raises:
        TypeError: an argument is not a number.
        ValueError: it is out of its range.
    """
    _check("kappa", kappa, at_least=1.0)
    _check("delta", delta, positive=True, finite=False)
    _check("x_norm", x_norm)
    if 2 * kappa * x_norm <= delta:
        return 0
    return math.ceil(2 * math.sqrt(kappa) * (math.log(2 * kappa) + math.log(x_norm) - math.log(delta)))


def implicit_gradient_error(
    lam: float,
    rho: float,
    mu: float,
    B: float,
    L: float,
    delta: float,
    delta_prime: float,
    *,
    everywhere: bool = False,
) -> float:
    """Lemma 3: a bound of the error ``|g - dL(phi*(theta))/dtheta|``; inf where its condition does not hold.

    As printed: ``(2 lam rho B / mu^2 + lam L / mu) delta + delta_prime`` if ``delta < mu / (2 rho)``. The proof needs less than
    Assumption 2: mu may bound the Hessian of G at only one of the points phi and phi*, if B bounds ``|dL/dphi|`` at the *other* one, and
    rho and L hold between them. (The Hessian at the other point is then at least ``mu - rho delta > mu / 2``.) Under these conditions it
    cannot be improved: a problem with one variable comes as close to it as one likes, when delta goes to ``mu / (2 rho)``.

    With ``everywhere``, mu holds at both points, as Assumption 2 says. Then the factor 2 and the condition are not needed:
    ``(lam rho B / mu^2 + lam L / mu) delta + delta_prime``. With M, M* for the Hessians of G and v, v* for the gradients of the outer
    loss at phi, phi*::

        M*^-1 v* - M^-1 v = M*^-1 (M - M*) M^-1 v* + M^-1 (v* - v),
        |M^-1| <= 1/mu,  |M*^-1| <= 1/mu,  |M - M*| <= rho delta,  |v*| <= B,  |v* - v| <= L delta.

    Args:
        lam: > 0.
        rho: >= 0; 0 for a quadratic training loss.
        mu: > 0.
        B, L: >= 0.
        delta, delta_prime: >= 0.
        everywhere: G is mu-strongly convex at every phi (for a convex training loss: with ``mu = lam``).

    Raises:
        TypeError: an argument is not a number.
        ValueError: it is out of its range.
    """
    _check("delta", delta, finite=False)
    _check("delta_prime", delta_prime, finite=False)
    B_1 = _lipschitz(lam, rho, mu, B, L, everywhere)
    if not everywhere and 2 * rho * delta >= mu:
        return math.inf
    return delta_prime if B_1 == 0 else B_1 * delta + delta_prime


def theorem2_tolerances(
    *, lam: float, rho: float, mu: float, B: float, L: float, eps: float, everywhere: bool = False
) -> tuple[float, float]:
    """``(delta, delta_prime)`` for which Lemma 3 gives at most ``eps``: half of it for each of the two solves.

    ``delta = 1 / (2 (B_1 / eps + rho / mu))``, with B_1 the factor of delta in Lemma 3, is below ``eps / (2 B_1)`` and below
    ``mu / (2 rho)``. The proof of Theorem 2 takes the smaller of these two; the second one itself is not below ``mu / (2 rho)``, as Lemma 3
    asks. With ``everywhere``, delta is ``eps / (2 B_1)``, with the smaller B_1. It is inf where the bound does not depend on delta.

    Solvers measure residuals. Where G is mu-strongly convex everywhere, ``|dG/dphi| <= mu delta`` implies ``|phi - phi*| <= delta``;
    and ``|dL/dphi - H u| <= mu delta_prime / lam`` implies Definition 2 for ``g = lam u``.

    Args:
        lam, rho, mu, B, L, everywhere: as in :func:`implicit_gradient_error`.
        eps: wanted accuracy of the gradient of one task, > 0, absolute.

    Raises:
        TypeError: an argument is not a number.
        ValueError: it is out of its range.
    """
    _check("eps", eps, positive=True)
    B_1 = _lipschitz(lam, rho, mu, B, L, everywhere)
    slope = B_1 if everywhere else B_1 + rho / mu * eps
    return (eps / (2 * slope) if slope > 0 else math.inf), eps / 2


def theorem2_iterations(
    *, kappa: float, D: float, lam: float, rho: float, mu: float, B: float, L: float, eps: float
) -> tuple[int, int]:
    """Theorem 2: ``(inner, linear)``, the iterations of Nesterov's method that give a gradient within ``eps``.

    ``inner = 2 sqrt(kappa) log(8 kappa D (B_1 / eps + rho / mu))`` with ``B_1 = 2 lam rho B / mu^2 + lam L / mu``, and
    ``linear = 2 sqrt(kappa) log(4 kappa (lam / mu) B / eps)``; rounded up, and 0 where a logarithm is negative. Each is Lemma 2, for
    solutions of norm at most D and ``(lam / mu) B`` and the accuracies of :func:`theorem2_tolerances`. The first has an 8 where a 4 would
    do, so that the error is at most ``3/4 eps``. For conjugate gradients a quarter of ``linear`` is enough: they need
    ``sqrt(kappa) / 2 log(2 sqrt(kappa) |x*| / delta_prime)``.

    To be read in the paper with care. The linear system is that of Definition 2; minimising Eq. 7 as printed gives half of its solution.
    No D bounds phi* for *all* theta, because every phi is the phi* of ``theta = phi + grad L_train(phi) / lam``; it must hold for the
    theta in question. Where the inner solver does not start at 0, D is a bound of ``|phi* - start|``; for the usual start, theta itself,
    ``|grad L_train(theta)| / mu`` is one.

    Args:
        kappa: >= 1.
        D: >= 0.
        lam, rho, mu, B, L: as in :func:`implicit_gradient_error`. mu must hold everywhere, because Lemma 2 needs that.
        eps: > 0, absolute.

    Raises:
        TypeError: an argument is not a number.
        ValueError: it is out of its range.
    """
    _check("kappa", kappa, at_least=1.0)
    _check("D", D)
    delta, delta_prime = theorem2_tolerances(lam=lam, rho=rho, mu=mu, B=B, L=L, eps=eps)
    return agd_iterations(kappa, delta / 2, D), agd_iterations(kappa, delta_prime, lam / mu * B)


def corollary1_calls(*, M: int, L_F: float, gap: float, eps: float) -> int:
    """Corollary 1: gradients of single tasks after which gradient descent has met a theta with ``|grad F(theta)| <= eps``.

    M for each of ``4 L_F (F(0) - min F) / eps^2`` steps of size ``1 / L_F``, their number rounded up. The paper does not say how
    accurate the gradients must be: within ``eps / sqrt(2)``, which is where the 4 comes from, since a step with a gradient that is off
    by e lowers F by at least ``(|grad F|^2 - e^2) / (2 L_F)``. Gradients within eps are not enough, for any number of calls.

    That F is smooth needs no assumption of its own: ``L_F = (lam / mu) (lam rho B / mu^2 + lam L / mu)`` under Assumption 2, which is
    ``lam / mu * implicit_gradient_error(lam, rho, mu, B, L, 1, 0, everywhere=True)``.

    Args:
        M: number of tasks, all of which are in every step, >= 1.
        L_F: Lipschitz constant of the gradient of F, the mean of the outer losses over the tasks, >= 0.
        gap: ``F(0) - min F``, or a bound of it, >= 0; with the F of the start where that is not 0.
        eps: > 0.

    Raises:
        TypeError: an argument is not a number.
        ValueError: it is out of its range.
    """
    if isinstance(M, bool) or not isinstance(M, Integral):
        raise TypeError(f"M: expected an integer, got {type(M).__name__} {M!r}.")
    _check("M", M, at_least=1)
    _check("L_F", L_F)
    _check("gap", gap)
    _check("eps", eps, positive=True)
    return int(M) * math.ceil(4 * L_F * gap / eps / eps)


def _lipschitz(lam: float, rho: float, mu: float, B: float, L: float, everywhere: bool) -> float:
    """The factor of delta in Lemma 3."""
    _check("lam", lam, positive=True)
    _check("rho", rho)
    _check("mu", mu, positive=True)
    _check("B", B)
    _check("L", L)
    return lam / mu * ((1 if everywhere else 2) * rho / mu * B + L)


def _check(name: str, value: float, *, positive: bool = False, at_least: float = 0.0, finite: bool = True) -> None:
    """Refuse what is no number or not in its range; NaN is in no range. It is not the check of the solvers' options, because infinity is
    allowed here (:func:`theorem2_tolerances` returns it) and kappa begins at 1.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}.")
    if not (value > 0 if positive else value >= at_least) or (finite and math.isinf(value)):
        kind = "a finite number" if finite else "a number"
        raise ValueError(f"{name}: expected {kind} {'> 0' if positive else f'>= {at_least:g}'}, got {value!r}.")
