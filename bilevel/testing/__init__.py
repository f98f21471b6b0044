"""For users who test problems and solvers of their own."""
