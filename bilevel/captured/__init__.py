"""A step as one CUDA graph: recorded once, then replayed without Python and without a launch for each operator."""

from bilevel.captured.step import CapturedStep

__all__ = ["CapturedStep"]
