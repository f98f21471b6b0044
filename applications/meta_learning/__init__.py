"""Few-shot learning with implicit gradients: iMAML (Rajeswaran et al. 2019) as the program `imaml`."""

import os

# Must be set before torch is loaded. By default the threads of OpenMP wait for one another in busy loops. A meta-step
# has thousands of short parallel parts, so where another program uses one of the cores, the others spin for its sake:
# on two cores, one of them busy, 11 s per meta-step with two threads, and 1.5 s with this (1.1 s with one thread).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
