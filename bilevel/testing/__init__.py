"""For users who test problems, solvers and gradients of their own.

Nothing of this is imported by ``import bilevel``. ``bilevel.testing.strategies`` needs the extra ``testing``, the rest does not.
"""

from bilevel.testing.check import check_hypergradient
from bilevel.testing.determinism import check_deterministic
from bilevel.testing.report import CheckFailed, Part, Report, Verdict

__all__ = ["CheckFailed", "Part", "Report", "Verdict", "check_deterministic", "check_hypergradient"]
