"""Settings and data so small that a meta-step takes milliseconds."""

from dataclasses import replace

from applications.meta_learning.config import Config
from applications.meta_learning.tasks import TaskSource, load_source

TINY = Config(
    glyph_classes=12,
    train_classes=7,
    image_size=12,
    ways=3,
    channels=4,
    lam=1.0,
    inner_steps=2,
    curvature="gauss-newton",
    linear_steps=2,
    meta_batch=3,
    outer_rate=1e-2,
    outer_steps=6,
    device="cpu",
    eval_interval=2,
    eval_tasks=4,
    eval_query_shots=2,
    log_interval=2,
    checkpoint_interval=2,
)


def as_options(config: Config) -> list[str]:
    """The settings as the command line takes them."""
    options = []
    for name, value in config.to_dict().items():
        words = name.replace("_", "-")
        options += [f"--{'' if value else 'no-'}{words}"] if isinstance(value, bool) else [f"--{words}", str(value)]
    return options


TINY_OPTIONS = as_options(TINY)

SINUSOID = replace(TINY, dataset="sinusoid", shots=5, query_shots=5, channels=8)


def tiny_source(config: Config = TINY) -> TaskSource:
    return load_source(config)
