"""The program `imaml`."""

from __future__ import annotations

import difflib
import shlex
import warnings
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

import bilevel
from applications.meta_learning.allocator import keep_freed_memory
from applications.meta_learning.checkpoint import load_checkpoint
from applications.meta_learning.config import (
    MAX_SEED,
    Config,
    ConfigError,
    option_name,
    refuse_untrainable,
    refuse_without_effect,
)
from applications.meta_learning.demo import Plan, demo_config, refuse_other_files, run_demo
from applications.meta_learning.display import Display
from applications.meta_learning.evaluate import (
    PAPER,
    TIGHT,
    Evaluation,
    Protocol,
)
from applications.meta_learning.experiments import EXPERIMENTS
from applications.meta_learning.experiments.base import read_numbers
from applications.meta_learning.info import (
    counts_table,
    print_checkpoint,
    print_environment,
    print_presets,
    two_columns,
)
from applications.meta_learning.logs import RunLog, read_log, to_json, write_json
from applications.meta_learning.method import REGIME, conditions
from applications.meta_learning.options import (
    START,
    TEST_SETTINGS,
    DataDir,
    Download,
    data_dir_for,
    err,
    out,
    reported_errors,
    with_settings,
)
from applications.meta_learning.predict import Prediction, predict
from applications.meta_learning.presets import DEFAULT_PRESET, PRESETS, preset
from applications.meta_learning.report import adaptation_figure, evaluation_table, prediction_table, training_figure
from applications.meta_learning.run import (
    CHECKPOINT,
    Ending,
    Run,
    alone,
    check_resumable,
    clear_folder,
    matching_source,
    nothing_without_checkpoint,
    prepare_folder,
    refuse_among_images,
    refuse_fixed,
    require_threads,
    require_writable,
    stop_on_signals,
    use_threads,
)
from applications.meta_learning.tasks import device_of, load_source
from applications.meta_learning.train import Trainer, TrainingFailed, load_theta

app = typer.Typer(
    name="imaml",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Few-shot learning with implicit gradients (iMAML, Rajeswaran et al. 2019).\n\n"
    "Start with [bold]imaml demo[/bold]; it needs no file and ends within 5 minutes.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"imaml of bilevel {bilevel.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", metavar="", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """What every command needs before it allocates anything."""
    keep_freed_memory()
    # advice of PyTorch to its own developers: `--linear exact` maps over operators in place
    warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")


@app.command()
@with_settings([f.name for f in fields(Config)])
def train(
    settings: dict[str, Any],
    preset_name: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="settings to start from (imaml info lists them); default: one for the data set; a resumed run keeps its own",
            rich_help_panel=START,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="folder of the run; default: runs/<preset>", rich_help_panel=START),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in --out", metavar="", rich_help_panel=START)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the run in --out", metavar="", rich_help_panel=START)
    ] = False,
    final_test: Annotated[
        bool, typer.Option(help="at the end, 600 test tasks as in the paper", metavar="", rich_help_panel=START)
    ] = True,
    tensorboard: Annotated[
        bool, typer.Option(help="write events for TensorBoard", metavar="", rich_help_panel=START)
    ] = True,
) -> None:
    """Meta-train, with checkpoints, a log and figures in one folder.

    Every option below overrides the preset (see them with imaml info PRESET).
    Ctrl-C saves and stops; --resume goes on exactly where it stopped.

    \b
    imaml train                                          generated characters
    imaml train --dataset omniglot --download --out runs/mine
    imaml train --preset omniglot-5w1s-hf --data-dir PATH    the paper's
    imaml train --dataset folder --data-dir PATH --ways 3    your own images
    imaml train --resume --out runs/mine
    """
    with reported_errors(), ExitStack() as held:
        if resume and overwrite:
            raise ConfigError("expected one of --resume and --overwrite, got both")
        require_threads(settings)
        chosen = _Chosen(settings, preset_name, data_dir, download)
        folder = folder or Path("runs") / chosen.name
        known = (folder / CHECKPOINT).exists()
        if known and (resume or overwrite):  # before it is read
            held.enter_context(alone(folder))
        stored = prepare_folder(folder, resume=resume, overwrite=overwrite)
        trainer, data_dir, changes = _begin(chosen, folder) if stored is None else _go_on(chosen, stored)
        trainer.require_tests(final=final_test)
        if not known:
            held.enter_context(alone(folder))
            prepare_folder(
                folder, resume=resume, overwrite=overwrite
            )  # again: meanwhile another process may have trained there
        if stored is None:
            clear_folder(folder)
            held.enter_context(nothing_without_checkpoint(folder))
        _train(trainer, folder, data_dir, changes, final_test=final_test, tensorboard=tensorboard)


@dataclass(frozen=True)
class _Chosen:
    """What the command line says of a run."""

    settings: dict[str, Any]
    preset_name: str | None
    data_dir: Path | None
    download: bool

    @property
    def name(self) -> str:
        """The preset to start from."""
        return self.preset_name or DEFAULT_PRESET[self.settings.get("dataset", "glyphs")]


def _begin(chosen: _Chosen, folder: Path) -> tuple[Trainer, Path | None, list[dict[str, Any]]]:
    """A new run. Its folder is made or cleared once its data and settings are known to be good."""
    config = replace(preset(chosen.name), **chosen.settings)
    refuse_untrainable(config)
    refuse_without_effect(config, chosen.settings)
    data_dir = data_dir_for(config.dataset, chosen.data_dir, chosen.download)
    refuse_among_images(config, folder, data_dir)
    device_of(config)  # before the data, which may take a minute
    use_threads(config)
    with out.status("loading the data ..."):
        source = load_source(config, data_dir=data_dir, download=chosen.download)
    return Trainer(config, source), data_dir, []


def _go_on(chosen: _Chosen, stored: dict[str, Any]) -> tuple[Trainer, Path | None, list[dict[str, Any]]]:
    """The stored run, and which settings change from here on."""
    old = Config.from_dict(stored["config"])
    if chosen.preset_name:
        preset(chosen.preset_name)  # a wrong name is an error here, too; with --resume it only says which folder
    refuse_fixed(old, chosen.settings)
    config = replace(old, **chosen.settings)
    refuse_untrainable(config)
    refuse_without_effect(config, chosen.settings)
    taken = stored["progress"]["step"]
    if config.outer_steps < taken:
        raise ConfigError(
            f"outer_steps: this run has taken {taken} steps; expected at least so many in all, got {config.outer_steps}. To begin anew, "
            "name another --out"
        )
    changes = [{"setting": n, "from": getattr(old, n), "to": getattr(config, n)} for n in check_resumable(old, config)]
    data_dir = data_dir_for(config.dataset, chosen.data_dir, chosen.download)
    device_of(config)
    use_threads(config)
    with out.status("loading the data ..."):
        source = matching_source(stored, config, data_dir=data_dir, download=chosen.download)
    trainer = Trainer(config, source)
    trainer.restore(stored)
    return trainer, data_dir or (Path(stored["data_dir"]) if stored["data_dir"] else None), changes


def _train(
    trainer: Trainer,
    folder: Path,
    data_dir: Path | None,
    changes: list[dict[str, Any]],
    *,
    final_test: bool,
    tensorboard: bool,
) -> None:
    progress, config = trainer.progress, trainer.config
    failure, began = None, progress.step
    # what is said once and not stored
    flags = ["--no-final-test"] * (not final_test) + ["--no-tensorboard"] * (not tensorboard)
    with (
        stop_on_signals() as stop,
        RunLog(folder, at_step=progress.step, tensorboard=tensorboard) as log,
        Display(out, config, start=progress.step) as display,
    ):
        run = Run(trainer, folder, data_dir=data_dir, log=log, display=display)
        run.start()
        for note in filter(
            None,
            [
                log.note,
                *(f"{option_name(c['setting'])}: {c['from']} -> {c['to']}" for c in changes),
                trainer.changed_rate(changes),
            ],
        ):
            out.print(note, highlight=False)
        if changes:
            log.write("changed", progress.step, progress.seconds, {"settings": changes})
        try:
            ending = run.loop(stop)
        except TrainingFailed as error:
            failure = error
    if failure is not None:
        _draw(folder, config)
        err.print("[bold red]Training ended:[/bold red] ", end="")
        _say(err, str(failure))
        _say(err, f"The checkpoint is {folder / CHECKPOINT} (step {progress.step}).")
        raise typer.Exit(1)
    if ending is Ending.STOPPED:
        with suppress(OSError):  # the terminal may be gone
            _say(err, f"Stopped at step {progress.step}; the checkpoint is written. Go on with:")
            _say(err, f"  {_resume(folder, flags)}")
        raise typer.Exit(130)
    _say(out, f"{ending.value}: {progress.step} steps in {progress.seconds / 60:.1f} min")
    if ending is Ending.DONE and progress.step == began:
        _say(out, "Nothing was left to do. For more steps, name their sum:")
        _say(out, f"  {_resume(folder, flags)} --outer-steps {2 * progress.step}")
    if ending is Ending.TIME and progress.step == began:
        _say(out, "Its time is used up. For more, name the sum, or 0 for no limit:")
        _say(out, f"  {_resume(folder, flags)} --minutes {2 * config.minutes:g}")
    try:
        _finish(trainer, folder, final_test)
    except OSError:
        _say(err, "Training is done and its checkpoint is written; what follows it failed:")
        raise
    if progress.step and progress.skipped_steps == progress.step:
        _say(err, f"Nothing was learned: no task of any meta-step had a usable gradient. {trainer.last_failure}")
        raise typer.Exit(1)


def _say(console: Console, text: str) -> None:
    """As it is: no markup in the names of folders, and whole lines, which can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _resume(folder: Path, flags: list[str]) -> str:
    return " ".join(["imaml train --resume --out", shlex.quote(str(folder)), *flags])


def _finish(trainer: Trainer, folder: Path, final_test: bool) -> None:
    """The last evaluation, the figures, and the table."""
    config, progress = trainer.config, trainer.progress
    if final_test:
        with out.status(f"{PAPER.tasks} test tasks ..."):
            result = _test(trainer, PAPER, seed=config.seed)
        write_json(
            folder / "results.json",
            {"step": progress.step, "seconds": progress.seconds, "evaluations": {PAPER.name: asdict(result)}},
        )
        out.print(
            evaluation_table(
                [("held-out, paper's protocol", result)], title=f"{escape(folder.name)}, step {progress.step}"
            )
        )
    if config.is_regression:
        curve = trainer.test_over_inner_steps(tasks=100, query_shots=config.eval_query_shots, seed=config.seed)
        adaptation_figure(
            {f"step {progress.step}": curve}, folder / "adaptation.png", "error over inner steps, held-out tasks"
        )
    _draw(folder, config)
    out.print(counts_table(trainer))
    _say(out, f"Figures, log and checkpoint: {folder}")
    _say(out, f"Next: imaml evaluate {shlex.quote(str(folder))}")


def _draw(folder: Path, config: Config) -> None:
    training_figure(read_log(folder / "log.jsonl"), folder / "curves.png", f"{config.dataset}: {_algorithm(config)}")


def _algorithm(config: Config) -> str:
    inner = f"{config.inner}, {config.inner_steps} steps"
    if config.algorithm == "maml" and config.truncate:
        return f"MAML, truncated ({inner}, through the last {config.truncate})"
    if config.algorithm == "imaml" and config.linear != "identity":
        return f"iMAML ({inner}; {config.linear}, {config.linear_steps} steps; {config.curvature})"
    names = {"maml": "MAML", "reptile": "Reptile", "first-order": "first-order MAML", "imaml": "first-order MAML"}
    return f"{names[config.algorithm]} ({inner})"


def _regulariser(config: Config) -> str:
    if not config.lam:
        return "no proximal term"
    return f"lambda {config.lam:g}" + (f", of the last layer {config.lam_head:g}" if config.lam_head else "")


def _test(trainer: Trainer, protocol: Protocol, seed: int) -> Evaluation:
    return trainer.test(tasks=protocol.tasks, query_shots=protocol.query_shots or trainer.config.shots, seed=seed)


@app.command("evaluate")
@with_settings(TEST_SETTINGS)
def evaluate_command(
    settings: dict[str, Any],
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint.pt, or the folder of a run", show_default=False)],
    protocol: Annotated[
        Literal["paper", "tight", "both"],
        typer.Option(
            help="paper: 600 tasks, K queries per class; tight: 1,000 tasks, 15 queries; or both (one, where --tasks and "
            "--query-shots are given)",
            metavar="CHOICE",
        ),
    ] = "both",
    tasks: Annotated[int | None, typer.Option(help="another number of tasks", min=2, show_default=False)] = None,
    query_shots: Annotated[
        int | None, typer.Option(help="another number of queries per class", min=1, show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="of the test tasks", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else", metavar="")] = False,
    data_dir: DataDir = None,
    download: Download = False,
) -> None:
    """Meta-test a checkpoint on its held-out classes.

    The classes are those of the split that is stored in the checkpoint. The
    inner solver is the one of the training, unless an option replaces it.
    """
    with reported_errors():
        require_threads(settings)
        if seed > MAX_SEED:
            raise ConfigError(f"seed: expected at most {MAX_SEED}, got {seed}")
        stored = load_checkpoint(checkpoint)
        config = replace(Config.from_dict(stored["config"]), **{"device": "auto", **settings})
        refuse_without_effect(config, settings)
        device_of(config)
        use_threads(config)
        data_dir = data_dir_for(config.dataset, data_dir, download)
        source = matching_source(stored, config, data_dir=data_dir, download=download)
        trainer = Trainer(config, source)
        load_theta(trainer.theta, stored["theta"])
        results = []
        for each in _protocols(protocol, tasks, query_shots):
            try:
                with err.status(f"{each.tasks} test tasks ..."):
                    results.append((each, _test(trainer, each, seed)))
            except ConfigError as error:
                if not results:
                    raise
                err.print(f"{each.name}: left out, {error}", highlight=False)
        step = stored["progress"]["step"]
    hopeless = [each.name for each, result in results if result.failed == result.tasks]
    if as_json:
        print(to_json(_evaluation_report(config, step, seed, results)))
    if hopeless:
        err.print(
            f"no task of {' and '.join(hopeless)} could be adapted: what the inner solver found is no number",
            highlight=False,
        )
    if as_json or hopeless:
        raise typer.Exit(1 if hopeless else 0)
    rows = [(each.name, result) for each, result in results]
    out.print(evaluation_table(rows, title=f"{config.dataset}, held-out ({config.split} split), step {step}"))
    out.print(f"inner solver {trainer.method.solver}, {_regulariser(config)}", highlight=False)


def _protocols(name: str, tasks: int | None, query_shots: int | None) -> list[Protocol]:
    """Those asked for. Where both numbers are named nothing tells the two apart: one then, with a name of its own."""
    if name == "both" and tasks and query_shots:
        return [Protocol(name="own", tasks=tasks, query_shots=query_shots)]
    asked = {"paper": [PAPER], "tight": [TIGHT], "both": [PAPER, TIGHT]}[name]
    return [replace(each, tasks=tasks or each.tasks, query_shots=query_shots or each.query_shots) for each in asked]


def _evaluation_report(
    config: Config, step: int, seed: int, results: list[tuple[Protocol, Evaluation]]
) -> dict[str, Any]:
    return {
        "dataset": config.dataset,
        "split": config.split,
        "ways": config.ways,
        "shots": config.shots,
        "step": step,
        "seed": seed,
        "conditions": conditions(config),
        "config": config.to_dict(),
        "evaluations": {each.name: asdict(result) for each, result in results},
    }


@app.command("predict")
@with_settings([name for name in TEST_SETTINGS if name not in ("chunk_size", "threads")])
def predict_command(
    settings: dict[str, Any],
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN", help="a checkpoint.pt, or the folder of a run", show_default=False)
    ],
    support: Annotated[
        Path,
        typer.Option(
            help="folder with a few labelled images of each class, <class>/<image>.png or .jpg",
            rich_help_panel=START,
            show_default=False,
        ),
    ],
    images: Annotated[
        list[Path],
        typer.Option(
            metavar="PATH...", help="image files, or folders of them", rich_help_panel=START, show_default=False
        ),
    ],
    # an option takes one value, so what a shell makes of --images photos/*.jpg is left over
    more_images: Annotated[list[Path] | None, typer.Argument(metavar="PATH", hidden=True)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else", metavar="")] = False,
) -> None:
    """Adapt a run to new classes, and classify images.

    The new classes are as many as the ways of the run, with a few images of
    each. All images are classified together: batch norm takes its statistics
    from them, so the answer for one depends on those beside it.

    \b
    imaml predict runs/trees --support new --images unknown/*.jpg
    """
    with reported_errors(), err.status("adapting ..."):
        try:
            found = predict(checkpoint, support, [*images, *(more_images or [])], settings=settings)
        except bilevel.SolverError as error:
            err.print(
                f"[bold red]Adaptation failed:[/bold red] {escape(str(error))}\n"
                "Its options here: --inner-step-size (0 finds one), --inner-steps, --lam.",
                highlight=False,
                soft_wrap=True,
            )
            raise typer.Exit(1) from error
    if as_json:
        print(to_json(_prediction_report(found)))
        return
    out.print(prediction_table(found))
    solve = found.adaptation
    status = f"{bilevel.Status(int(solve.codes)).name} after {int(solve.steps)} steps, |dG/dphi| {solve.residual:.2g}"
    out.print(f"adaptation: {status}", highlight=False)
    out.print(f"batch norm: {REGIME}", highlight=False)
    if len(found.files) < len(found.classes):
        out.print(
            "These are few images for batch norm. Name the support images too, as further PATHs.", highlight=False
        )


def _prediction_report(found: Prediction) -> dict[str, Any]:
    """What the table says, the probabilities of all classes, and what they depend on."""
    solve = found.adaptation
    rows = zip(found.files, found.labels, found.probabilities.tolist(), strict=True)
    return {
        "step": found.step,
        "classes": list(found.classes),
        "shots": found.shots,
        "conditions": conditions(found.config),
        "config": found.config.to_dict(),
        "adaptation": {
            "status": bilevel.Status(int(solve.codes)).name,
            "steps": int(solve.steps),
            "residual": solve.residual.item(),
        },
        "predictions": [
            {
                "file": str(file),
                "class": label,
                "probability": max(row),
                "probabilities": dict(zip(found.classes, row, strict=True)),
            }
            for file, label, row in rows
        ],
    }


@app.command()
def info(
    what: Annotated[
        str | None, typer.Argument(help="a preset, a checkpoint.pt, or the folder of a run", show_default=False)
    ] = None,
) -> None:
    """The settings of a preset, or what is in a checkpoint; without a name, the presets and this machine."""
    with reported_errors():
        if what is None:
            print_presets()
            print_environment()
        elif what in PRESETS:
            out.print(two_columns(what, list(preset(what).to_dict().items())))
        elif Path(what).exists():
            print_checkpoint(Path(what))
        else:
            near = difflib.get_close_matches(what, PRESETS, n=3)
            raise ConfigError(
                f"{what} is no preset and no file{', did you mean ' + ' or '.join(near) if near else ''}; imaml info lists the presets"
            )


@app.command("demo")
def demo_command(
    folder: Annotated[
        Path, typer.Option("--out", help="where figures and numbers go, in the place of those of an earlier demo")
    ] = Path("demo-results"),
    seconds: Annotated[float, typer.Option(help="time for all of it, 30 at least", min=30)] = Plan.seconds,
    seed: Annotated[int, typer.Option(help="of the characters, the network and the tasks", min=0)] = 0,
) -> None:
    """Train first-order MAML and iMAML on generated characters, and compare.

    Needs no file and no network. Prints the accuracy of the untrained network,
    of first-order MAML and of iMAML at equal outer steps and at equal time,
    whichever wins; draws curves and a task. Exit code 1: one of both did not
    get above the untrained network.
    """
    with reported_errors():
        require_writable(folder)
        refuse_other_files(folder)
        first_order, imaml = (replace(config, seed=seed) for config in demo_config())
        try:
            above = run_demo(first_order, imaml, Plan(seconds=seconds), folder, out)
        except TrainingFailed as error:
            err.print(str(error), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
    if not above:
        err.print("One of both is not above the untrained network.")
        raise typer.Exit(1)


@app.command()
def experiment(
    name: Annotated[
        str | None,
        typer.Argument(help="its name, or e1 for all whose name starts so; none: list them", show_default=False),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="folder for NAME.json, NAME.png and NAME.md")] = Path(
        "experiments"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="a minute at most, on the same code; the numbers mean little", metavar="")
    ] = False,
    seed: Annotated[int, typer.Option(help="of the random problems", min=0)] = 0,
    only: Annotated[
        str | None, typer.Option(help="one cell of a table (e4), as the error for a wrong name lists them")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Repeat a figure or table of the paper: numbers as JSON, and a figure and a page made from them.

    A long one that was interrupted goes on where it was when the same command
    is given again.
    """
    with reported_errors():
        if name is None:
            out.print(two_columns("experiments", [(e.name, e.title) for e in EXPERIMENTS]))
            return
        wanted = [e for e in EXPERIMENTS if name in (e.name, e.name.split("_")[0])]
        if not wanted:
            raise ConfigError(f"there is no experiment {name!r}; imaml experiment lists them")
        require_writable(folder)
        for one in wanted:
            if only is not None and not one.cells:
                raise ConfigError(
                    f"--only: {one.name} is measured as a whole, so there is no {only!r} in it; leave --only out"
                )
            if only is not None and only not in one.cells:
                near = difflib.get_close_matches(only, one.cells, n=3) or one.cells[:3]
                raise ConfigError(
                    f"--only: got {only!r}; expected one of the {len(one.cells)} cells of {one.name}, such as {', '.join(near)}"
                )
            out.print(one.title, highlight=False)
            path = one.record(
                folder, quick=quick, seed=seed, data_dir=data_dir_for("omniglot", data_dir), only=only, console=out
            )
            if read_numbers(path)["result"].get("dataset") == "glyphs":
                out.print("These are generated characters, not Omniglot: --data-dir names its folder.", highlight=False)
            out.print(f"{path}, and beside it the figure (.png) and the page (.md)", markup=False, highlight=False)
