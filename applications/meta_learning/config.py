"""All settings of a run. A field says its name, default, bounds and help once; the command line is made from these."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

DATA = "Data and tasks"
NETWORK = "Network"
INNER = "Inner problem: adaptation to one task"
META = "Meta-gradient"
OUTER = "Outer loop"
RUN = "Run"


# What runs did that were written before these settings were there.
IMPLIED = {"colours": "grey", "network": "strided", "capture": False, "compile": False, "weight_decay": 0.0}

MAX_SEED = 2**62  # what all generators take, held-out tasks with a seed of their own included
LARGEST_OMNIGLOT = 105  # pixels: the drawings as they were made
SMALLEST_POOLED = 16  # pixels: what can be halved four times, rounding down


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work; the message says what to give instead."""


def setting(
    default: Any,
    panel: str,
    text: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    fixed: bool = False,
) -> Any:
    """A field of `Config` with its help text and bounds. `fixed`: a resumed run cannot change it."""
    meta = {"panel": panel, "help": text, "at_least": at_least, "above": above, "at_most": at_most, "fixed": fixed}
    return field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of one run. Letters and defaults are those of the paper where it has them.

    Raises:
        ConfigError: a value is outside its bounds, or does not go with another one.
    """

    # Data and tasks
    dataset: Literal["glyphs", "omniglot", "mini-imagenet", "folder", "sinusoid"] = setting(
        "glyphs",
        DATA,
        "glyphs: generated characters, needs no file; omniglot, mini-imagenet, folder (your own images): see --data-dir; "
        "sinusoid: regression",
        fixed=True,
    )
    split: Literal["random", "alphabets", "published"] = setting(
        "random",
        DATA,
        "classes held out: a random choice; alphabets: the evaluation alphabets of omniglot; published: that of mini-imagenet",
        fixed=True,
    )
    train_classes: int = setting(
        1200,
        DATA,
        "classes for meta-training in a random split; the others are held out; 0: three quarters",
        at_least=0,
        fixed=True,
    )
    glyph_classes: int = setting(1600, DATA, "number of characters to generate (glyphs)", at_least=2, fixed=True)
    rotations: bool = setting(
        True, DATA, "in training, turn the classes of a task by multiples of 90 degrees", fixed=True
    )
    image_size: int = setting(28, DATA, "height and width of the images in pixels", at_least=8, fixed=True)
    colours: Literal["grey", "rgb"] = setting(
        "grey", DATA, "grey or rgb images (folder); mini-imagenet is rgb", fixed=True
    )
    ways: int = setting(5, DATA, "classes per task", at_least=2, fixed=True)
    shots: int = setting(1, DATA, "support examples per class (sinusoid: per task)", at_least=1, fixed=True)
    query_shots: int = setting(1, DATA, "query examples per class in training", at_least=1, fixed=True)
    eval_query_shots: int = setting(5, DATA, "query examples per class in the evaluations during training", at_least=1)

    # Network
    network: Literal["strided", "pooled"] = setting(
        "strided",
        NETWORK,
        "4 convolutions; strided: with stride 2; pooled: with max-pooling, for mini-imagenet",
        fixed=True,
    )
    channels: int = setting(64, NETWORK, "filters per layer (sinusoid: hidden units)", at_least=1, fixed=True)
    zero_head: bool = setting(False, NETWORK, "start the last layer at zero", fixed=True)

    # Inner problem
    lam: float = setting(
        2.0, INNER, "lambda: strength of the pull of phi towards theta; 0: none (imaml: in evaluate only)", at_least=0
    )
    lam_head: float = setting(0.0, INNER, "lambda of the last layer; 0: the same as --lam", at_least=0)
    inner: Literal["gd", "agd", "newton-cg"] = setting(
        "gd", INNER, "gd: gradient descent; agd: accelerated; newton-cg: Hessian-free Newton"
    )
    inner_steps: int = setting(16, INNER, "steps of the inner solver", at_least=1)
    inner_step_size: float = setting(
        0.1,
        INNER,
        "step size of gd and agd; 0: found for every task (gd: line search)",
        at_least=0,
    )
    inner_momentum: float = setting(
        0.0, INNER, "agd: fixed momentum, below 1; 0: Nesterov's own sequence with restarts", at_least=0
    )
    inner_tol: float = setting(
        0.0, INNER, "stop a task when |dG/dphi| is at most this; 0: always all steps", at_least=0
    )
    direction_steps: int = setting(5, INNER, "newton-cg: CG steps for one direction", at_least=1)
    inner_curvature: Literal["hessian", "gauss-newton"] = setting(
        "hessian", INNER, "newton-cg: matrix of the direction, hessian or gauss-newton"
    )
    inner_damping: float = setting(0.0, INNER, "newton-cg: added to the diagonal of that matrix", at_least=0)

    # Meta-gradient
    algorithm: Literal["imaml", "maml", "first-order", "reptile"] = setting(
        "imaml",
        META,
        "imaml; maml: through the steps of the inner solver; first-order: query gradient at the adapted parameters; reptile",
    )
    truncate: int = setting(0, META, "maml: through the last so many steps only; 0: through all", at_least=0)
    linear: Literal["cg", "neumann", "identity", "exact"] = setting(
        "cg", META, "solver of the linear system: cg, neumann, exact; identity: none at all, first-order MAML"
    )
    linear_steps: int = setting(5, META, "CG steps, or terms of the Neumann series", at_least=1)
    linear_rtol: float = setting(
        0.0, META, "stop at this relative residual; 0: always all steps", at_least=0, at_most=0.9
    )
    steihaug: bool = setting(False, META, "cg: at negative curvature keep the answer so far; otherwise the task fails")
    curvature: Literal["hessian", "gauss-newton"] = setting(
        "hessian", META, "matrix of the linear system: hessian, or gauss-newton, which cannot be indefinite"
    )
    damping: float = setting(0.0, META, "added to the diagonal of that matrix", at_least=0)

    # Outer loop
    outer_steps: int = setting(20_000, OUTER, "meta-steps", at_least=1)
    minutes: float = setting(0.0, OUTER, "stop after this time, evaluations included; 0: no limit", at_least=0)
    meta_batch: int = setting(32, OUTER, "tasks per meta-step", at_least=1)
    outer_rate: float = setting(1e-3, OUTER, "learning rate of Adam", above=0, at_most=1e6)
    outer_eps: float = setting(1e-8, OUTER, "epsilon of Adam (the authors' code: 1e-3)", above=0)
    weight_decay: float = setting(
        0.0, OUTER, "decay of theta by this times the learning rate in each meta-step (AdamW)", at_least=0
    )
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", OUTER, "learning rate over the outer steps: constant, or linear or cosine down to 0"
    )
    max_failed_steps: int = setting(
        10, OUTER, "give up after so many meta-steps in a row without a usable task", at_least=1
    )

    # Run
    seed: int = setting(0, RUN, "of the split, the network, and the tasks", at_least=0, at_most=MAX_SEED, fixed=True)
    device: str = setting("auto", RUN, "auto: a GPU if there is one; or cpu, cuda, cuda:1")
    dtype: Literal["float32", "float64"] = setting("float32", RUN, "float32 or float64", fixed=True)
    threads: int = setting(0, RUN, "CPU threads; 0: what PyTorch chooses", at_least=0)
    chunk_size: int = setting(
        0, RUN, "tasks that are worked on at once, to save memory; 0: all, on a GPU as many as it holds", at_least=0
    )
    outer_chunk_size: int = setting(
        0, RUN, "the same for the query loss alone, which needs the most memory; 0: as --chunk-size", at_least=0
    )
    capture: bool = setting(
        False, RUN, "on a GPU, replay the whole meta-step as one CUDA graph, where it never looks at a number"
    )
    compile: bool = setting(
        False,
        RUN,
        "imaml: record the derivatives in the first meta-step and replay them; up to twice as fast for a small network, slower with "
        "convolutions",
    )
    eval_interval: int = setting(100, RUN, "meta-steps between evaluations on held-out classes; 0: none", at_least=0)
    eval_tasks: int = setting(100, RUN, "tasks of such an evaluation", at_least=2)
    log_interval: int = setting(
        10, RUN, "meta-steps between lines of the log; without a terminal one in half a minute is shown", at_least=1
    )
    checkpoint_interval: int = setting(100, RUN, "meta-steps between checkpoints", at_least=1)

    def __post_init__(self) -> None:
        types = get_type_hints(Config)
        for f in fields(self):
            _check_type(f.name, types[f.name], getattr(self, f.name))
            _check_bounds(
                f.name, getattr(self, f.name), **{each: f.metadata[each] for each in ("at_least", "above", "at_most")}
            )
        self._check_combinations()

    def _check_combinations(self) -> None:
        self._check_data()
        self._check_algorithm()

    def _check_data(self) -> None:
        if self.split == "alphabets" and self.dataset != "omniglot":
            raise ConfigError(
                f"split: expected 'random' for the data set {self.dataset}, which has no alphabets, got 'alphabets'"
            )
        if (self.split == "published") != (self.dataset == "mini-imagenet"):
            raise ConfigError(
                f"split: expected 'published' for mini-imagenet and for no other data set, got {self.split!r} for {self.dataset} "
                f"(of the preset, maybe); add --split {'published' if self.dataset == 'mini-imagenet' else 'random'}"
            )
        if self.dataset != "folder" and (self.colours == "rgb") != (self.dataset == "mini-imagenet"):
            raise ConfigError(
                f"colours: expected 'rgb' for mini-imagenet, and 'grey' for drawings, got {self.colours!r} for {self.dataset} (of the "
                f"preset, maybe); add --colours {'rgb' if self.dataset == 'mini-imagenet' else 'grey'}"
            )
        if self.dataset == "omniglot" and self.image_size > LARGEST_OMNIGLOT:
            raise ConfigError(
                f"image_size: expected at most {LARGEST_OMNIGLOT} for omniglot, whose drawings are that large, got {self.image_size}"
            )
        if self.network == "pooled" and self.image_size < SMALLEST_POOLED:
            raise ConfigError(
                f"image_size: expected at least {SMALLEST_POOLED} for network='pooled', which halves it four times, "
                f"got {self.image_size}"
            )
        if self.dataset == "glyphs" and self.train_classes >= self.glyph_classes:
            raise ConfigError(
                f"train_classes: expected less than the {self.glyph_classes} characters to generate, so that some are "
                f"held out, "
                f"got {self.train_classes}; raise --glyph-classes"
            )

    def _check_algorithm(self) -> None:
        if self.lam_head and not self.lam:
            raise ConfigError(
                f"lam_head: expected 0, because lam is 0, got {self.lam_head} (of the preset, maybe); add --lam-head 0"
            )
        if self.truncate and self.algorithm != "maml":
            raise ConfigError(f"truncate: expected algorithm='maml', whose option it is, got {self.algorithm!r}")
        if self.truncate and not self.lam:
            raise ConfigError(
                "truncate: expected lam above 0: without the proximal term theta is in the start alone, which truncation cuts off"
            )
        if self.algorithm == "maml" and self.outer_chunk_size:
            raise ConfigError("outer_chunk_size: maml has no outer loss of its own to cut; use chunk_size")
        if self.compile and self.capture:
            raise ConfigError(
                "compile: expected one of --compile and --capture; a graph holds what is recorded already"
            )
        if self.algorithm == "maml" and self.inner == "newton-cg" and self.inner_curvature == "gauss-newton":
            raise ConfigError(
                "inner_curvature: expected 'hessian' for maml, which cannot differentiate through steps with gauss-newton; or --inner gd"
            )
        if self.weight_decay * self.outer_rate >= 1:
            raise ConfigError(
                f"weight_decay: expected less than 1 / outer_rate, here {1 / self.outer_rate:g}, because a meta-step multiplies theta by "
                f"1 - weight_decay * outer_rate; got {self.weight_decay:g}"
            )
        if self.inner_momentum >= 1:
            raise ConfigError(f"inner_momentum: expected a number below 1, got {self.inner_momentum}")
        if self.steihaug and self.linear != "cg":
            raise ConfigError(f"steihaug: expected linear='cg', whose option it is, got linear={self.linear!r}")
        if self.linear == "identity" and self.damping:
            raise ConfigError(
                "damping: first-order MAML (linear='identity') has no matrix to add it to; expected damping=0"
            )

    @property
    def needs_files(self) -> bool:
        """Whether the data are read from a folder."""
        return self.dataset in ("omniglot", "mini-imagenet", "folder")

    @property
    def is_regression(self) -> bool:
        """Whether the tasks have real targets instead of labels."""
        return self.dataset == "sinusoid"

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON and checkpoints."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        """The settings that `to_dict` wrote, checked again.

        Raises:
            ConfigError: a setting is missing, unknown or wrong.
        """
        known, values = {f.name for f in fields(Config)}, {**IMPLIED, **values}
        if set(values) != known:
            raise ConfigError(
                f"expected the settings of this version, got unknown {sorted(set(values) - known)} and missing "
                f"{sorted(known - set(values))}; use the version that wrote them"
            )
        return Config(**values)


def changed_fields(old: Config, new: Config) -> list[str]:
    """Names of the fields in which two configs differ."""
    return [f.name for f in fields(Config) if getattr(old, f.name) != getattr(new, f.name)]


FIXED_FIELDS = frozenset(f.name for f in fields(Config) if f.metadata["fixed"])


EFFECT = (  # which settings have an effect with which values of another one only
    (("inner_step_size",), "inner", ("gd", "agd")),
    (("inner_momentum",), "inner", ("agd",)),
    (("direction_steps", "inner_curvature", "inner_damping"), "inner", ("newton-cg",)),
    (("linear", "linear_steps", "linear_rtol", "curvature", "damping", "steihaug", "compile"), "algorithm", ("imaml",)),
    (("linear_steps", "linear_rtol"), "linear", ("cg", "neumann")),
    (("curvature",), "linear", ("cg", "neumann", "exact")),
)


def refuse_without_effect(config: Config, asked: Collection[str]) -> None:
    """Refuse a setting that somebody asked for, with another value than its default, and that nothing would read.

    What a preset or a stored run says beside that is free: it is there for the other values.

    Raises:
        ConfigError: there is one.
    """
    default = {f.name: f.default for f in fields(Config)}
    for names, other, values in EFFECT:
        found = getattr(config, other)
        for name in names:
            if name in asked and found not in values and getattr(config, name) != default[name]:
                needed = " or ".join(f"{option_name(other)} {value}" for value in values)
                raise ConfigError(
                    f"{name}: has no effect with {option_name(other)} {found}; leave it out, or add {needed}"
                )


def refuse_untrainable(config: Config) -> None:
    """Refuse what may be tested, and not trained.

    Raises:
        ConfigError: iMAML without the proximal term.
    """
    if not config.lam and config.algorithm == "imaml":
        raise ConfigError(
            "lam: expected a number above 0 to train with imaml, whose gradient is that of the proximal problem, got 0; to test a run "
            "without it, imaml evaluate takes 0"
        )


def option_name(name: str) -> str:
    """A field's name as a command line option."""
    return "--" + name.replace("_", "-")


def _check_type(name: str, expected: Any, value: Any) -> None:
    if get_origin(expected) is Literal:
        if value not in get_args(expected):
            raise ConfigError(f"{name}: expected one of {', '.join(get_args(expected))}, got {value!r}")
        return
    accepted = (int, float) if expected is float else expected
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise ConfigError(f"{name}: expected {expected.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}: expected a finite number, got {value!r}")


def _check_bounds(name: str, value: Any, *, at_least: float | None, above: float | None, at_most: float | None) -> None:
    if at_most is not None and value > at_most:
        raise ConfigError(f"{name}: expected at most {at_most}, got {value!r}")
    if at_least is not None and value < at_least:
        raise ConfigError(f"{name}: expected at least {at_least}, got {value!r}")
    if above is not None and value <= above:
        raise ConfigError(f"{name}: expected a number above {above}, got {value!r}")
