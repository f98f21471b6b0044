"""Few-shot data: Omniglot, generated glyphs and sinusoids, splits of their classes, and samplers of task batches."""

from applications.meta_learning.data.classes import DataError, ImageClasses
from applications.meta_learning.data.glyphs import generate_glyphs
from applications.meta_learning.data.omniglot import load_omniglot
from applications.meta_learning.data.samplers import Sampler, SinusoidSampler, TaskBatch, TaskSampler
from applications.meta_learning.data.splits import Split, alphabet_split, random_split

__all__ = [
    "DataError",
    "ImageClasses",
    "Sampler",
    "SinusoidSampler",
    "Split",
    "TaskBatch",
    "TaskSampler",
    "alphabet_split",
    "generate_glyphs",
    "load_omniglot",
    "random_split",
]
