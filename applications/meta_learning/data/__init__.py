"""Few-shot data: Omniglot, Mini-ImageNet, folders of images, generated glyphs, sinusoids; splits and samplers of tasks."""

from applications.meta_learning.data.classes import DataError, ImageClasses
from applications.meta_learning.data.folder import load_folder
from applications.meta_learning.data.glyphs import generate_glyphs
from applications.meta_learning.data.mini_imagenet import load_mini_imagenet
from applications.meta_learning.data.omniglot import load_omniglot
from applications.meta_learning.data.samplers import Sampler, SinusoidSampler, TaskBatch, TaskSampler
from applications.meta_learning.data.splits import Split, alphabet_split, published_split, random_split

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
    "load_folder",
    "load_mini_imagenet",
    "load_omniglot",
    "published_split",
    "random_split",
]
