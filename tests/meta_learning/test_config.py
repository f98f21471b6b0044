"""Settings, presets, and what they become."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from applications.meta_learning.algorithms import MAML, FirstOrderMAML, ImplicitMAML, Reptile
from applications.meta_learning.config import Config, ConfigError, changed_fields
from applications.meta_learning.method import build_method, build_network
from applications.meta_learning.models import count_parameters
from applications.meta_learning.presets import DEFAULT_PRESET, PRESETS, describe, preset
from applications.meta_learning.tasks import device_of
from bilevel.curvature import GaussNewton, Hessian
from bilevel.linsys import CG, Exact, Identity, Neumann
from bilevel.solvers import GradientDescent, NesterovAGD, NewtonCG


def test_settings_survive_a_round_trip() -> None:
    config = Config(ways=7, lam=0.3, inner="newton-cg")
    assert Config.from_dict(config.to_dict()) == config
    assert changed_fields(config, replace(config, lam=0.4, ways=8)) == ["ways", "lam"]


def test_settings_are_frozen_and_named() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().lam = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError, match="lamda"):
        Config(lamda=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("ways", 1, "ways: expected at least 2, got 1"),
        ("lam", -1.0, "lam: expected at least 0"),
        ("lam", float("nan"), "lam: expected a finite number"),
        ("lam", True, "lam: expected float"),
        ("inner", "adam", "inner: expected one of gd, agd, newton-cg, got 'adam'"),
        ("dataset", "mnist", "dataset: expected one of glyphs, omniglot, mini-imagenet, folder, sinusoid, got"),
        ("outer_steps", 10.0, "outer_steps: expected int"),
        ("minutes", -1.0, "minutes: expected at least 0"),
        ("split", "alphabets", "split: expected 'random'"),
        ("train_classes", 1600, "train_classes: expected less than the 1600.*raise --glyph-classes"),
        ("outer_rate", 0.0, "outer_rate: expected a number above 0"),
        ("weight_decay", 1000.0, "weight_decay: expected less than 1 / outer_rate, here 1000, .*got 1000"),
        ("weight_decay", -0.1, "weight_decay: expected at least 0"),
        ("inner_momentum", 1.0, "inner_momentum: expected a number below 1, got 1.0"),
        ("seed", -1, "seed: expected at least 0"),
    ],
)
def test_wrong_settings_are_refused(field: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**{field: value})  # type: ignore[arg-type]


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="steihaug: expected linear='cg'"):
        Config(steihaug=True, linear="neumann")
    with pytest.raises(ConfigError, match="damping: first-order MAML"):
        Config(damping=1.0, linear="identity")


def test_settings_of_another_version_are_refused() -> None:
    values = Config().to_dict()
    del values["lam"]
    with pytest.raises(ConfigError, match=r"missing \['lam'\]"):
        Config.from_dict(values)
    with pytest.raises(ConfigError, match=r"unknown \['mu'\]"):
        Config.from_dict({**Config().to_dict(), "mu": 1})


@pytest.mark.parametrize(("ways", "steps"), [(5, 16), (20, 25)])
@pytest.mark.parametrize("shots", [1, 5])
def test_the_presets_of_table_2_are_the_papers(ways: int, shots: int, steps: int) -> None:
    rows = [preset(f"omniglot-{ways}w{shots}s-{name}") for name in ("gd", "hf", "fo", "maml", "reptile")]
    for config in rows:
        assert (config.ways, config.shots, config.query_shots) == (ways, shots, shots)
        assert (config.outer_rate, config.outer_steps, config.meta_batch) == (1e-3, 20_000, 32)
        assert (config.channels, config.train_classes, config.rotations, config.split) == (64, 1200, True, "random")
        assert (config.curvature, config.damping, config.schedule, config.dataset) == (
            "hessian",
            0,
            "constant",
            "omniglot",
        )
    gd, hf, fo, maml, reptile = rows
    assert gd.lam == hf.lam == 2.0 and fo.lam == maml.lam == reptile.lam == 0.0
    method = build_method(gd, build_network(gd))
    solver = GradientDescent(step_size=0.1, max_steps=steps)
    assert method.algorithm == ImplicitMAML(solver=solver, linsys=CG(max_steps=5, rtol=0.0))
    assert build_method(hf, build_network(hf)).solver == NewtonCG(max_steps=3, cg_steps=5)
    for config, kind in ((fo, FirstOrderMAML), (maml, MAML), (reptile, Reptile)):
        assert build_method(config, build_network(config)).algorithm == kind(solver=solver)


def test_every_preset_is_described_and_every_data_set_has_one() -> None:
    assert all(describe(name) for name in PRESETS)
    for dataset, name in DEFAULT_PRESET.items():
        assert preset(name).dataset == dataset
    with pytest.raises(ConfigError, match="there is no preset 'nope'; did you mean glyphs"):
        preset("nope")


@pytest.mark.parametrize(
    ("settings", "solver"),
    [
        (
            {"inner": "gd", "inner_steps": 3, "inner_step_size": 0.2, "inner_tol": 0.1},
            GradientDescent(step_size=0.2, max_steps=3, tol=0.1),
        ),
        ({"inner": "gd", "inner_steps": 3, "inner_step_size": 0.0}, GradientDescent(step_size=None, max_steps=3)),
        ({"inner": "agd", "inner_steps": 4, "inner_step_size": 0.2}, NesterovAGD(step_size=0.2, max_steps=4)),
        (
            {"inner": "agd", "inner_steps": 4, "inner_step_size": 0.2, "inner_momentum": 0.5},
            NesterovAGD(step_size=0.2, max_steps=4, momentum=0.5),
        ),
        (
            {
                "inner": "newton-cg",
                "inner_steps": 2,
                "direction_steps": 4,
                "inner_curvature": "gauss-newton",
                "inner_damping": 0.5,
            },
            NewtonCG(max_steps=2, cg_steps=4, curvature=GaussNewton(), damping=0.5),
        ),
    ],
)
def test_inner_solvers(settings: dict[str, object], solver: object) -> None:
    config = replace(Config(channels=4), **settings)  # type: ignore[arg-type]
    assert build_method(config, build_network(config)).solver == solver


@pytest.mark.parametrize(
    ("settings", "linsys"),
    [
        (
            {"linear": "cg", "linear_steps": 7, "linear_rtol": 1e-3, "steihaug": True},
            CG(max_steps=7, rtol=1e-3, steihaug=True),
        ),
        ({"linear": "neumann", "linear_steps": 7}, Neumann(num_terms=7)),
        ({"linear": "identity"}, Identity()),
        ({"linear": "exact"}, Exact()),
    ],
)
def test_linear_solvers(settings: dict[str, object], linsys: object) -> None:
    config = replace(Config(channels=4), curvature="gauss-newton", **settings)  # type: ignore[arg-type]
    method = build_method(config, build_network(config))
    assert isinstance(method.algorithm, ImplicitMAML)
    assert method.algorithm.linsys == linsys and method.algorithm.curvature == GaussNewton()
    assert build_method(replace(config, curvature="hessian"), build_network(config)).algorithm.curvature == Hessian()


def test_lambda_of_head_and_body() -> None:
    config = Config(channels=2, lam=2.0, lam_head=0.5)
    net = build_network(config)
    ones = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    for settings, head in ((config, 0.5), (replace(config, lam_head=0.0), 2.0)):
        product = build_method(settings, net).problem.curvature_product(ones)  # lambda times a vector of ones
        assert {name: float(leaf.max()) for name, leaf in product.items()} == {
            name: head if name.startswith("head") else 2.0 for name in ones
        }


def test_exact_on_a_large_network_is_refused() -> None:
    config = Config(linear="exact")
    with pytest.raises(
        ConfigError, match="'exact' builds a dense Hessian; expected at most 5000 parameters, the network has 11"
    ):
        build_method(config, build_network(config))


def test_the_network_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_network(Config(seed=3, channels=4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_network(Config(seed=3, channels=4))
    other = build_network(Config(seed=4, channels=4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert count_parameters(build_network(preset("sinusoid"))) == 40 + 40 + 1600 + 40 + 40 + 1


def test_a_device_that_is_not_there_is_refused() -> None:
    assert device_of(Config(device="cpu")).type == "cpu"
    for name in ("tpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device: expected auto or a device that works here, got '{name}'"):
            device_of(Config(device=name))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lam": 0.0, "lam_head": 1.0, "algorithm": "maml"}, "lam_head: expected 0, because lam is 0"),
        ({"truncate": 2}, "truncate: expected algorithm='maml'"),
        ({"truncate": 2, "algorithm": "maml", "lam": 0.0}, "truncate: expected lam above 0"),
        (
            {"algorithm": "maml", "inner": "newton-cg", "inner_curvature": "gauss-newton"},
            "inner_curvature: expected 'hessian' for maml, .*; or --inner gd",
        ),
        ({"compile": True, "capture": True}, "compile: expected one of --compile and --capture"),
        ({"algorithm": "maml", "outer_chunk_size": 2}, "outer_chunk_size: maml has no outer loss of its own"),
    ],
)
def test_settings_of_the_algorithms(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**settings)  # type: ignore[arg-type]
