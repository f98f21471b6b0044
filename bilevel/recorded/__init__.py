"""The derivatives of a problem as flat lists of tensor operations: recorded once, replayed without autograd.

Autograd builds a graph for each gradient and walks it for each Hessian product. Where the tensors are small, that costs more
than the arithmetic. Here the value, the gradient, the Hessian product and the cross product at a point are recorded together
as one program, which is then cut into what depends on the point alone and is done once there, and the two linear maps
``v -> H v`` and ``u -> C^T u``, done for every vector.

A program holds for the shapes, strides, dtypes and static leaves of data that it was recorded for, and for the Python values
that the user's functions captured. Whether those are still the same is checked at the end of every solve, by one gradient that
autograd takes. The products are compared with those of autograd when they are recorded.
"""

from bilevel.recorded.programs import Programs, Session, with_programs
from bilevel.recorded.tracing import TracedObjective

__all__ = ["Programs", "Session", "TracedObjective", "with_programs"]
