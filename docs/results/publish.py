"""Turn measurements into results that can be committed: JSON, a figure, and the page made from the JSON.

    python docs/results/publish.py run RUN NAME [EVALUATION.json ...]
    python docs/results/publish.py page NAME
    python docs/results/publish.py benchmark NAME

RUN is the folder of ``imaml train``; each EVALUATION is what ``imaml evaluate RUN --json`` printed. Writes NAME.json, NAME.png and
NAME.md beside this file; ``page`` makes the page again. ``benchmark`` makes NAME.md, and the figure where there is one, from the NAME.json
that benchmarks/NAME.py wrote. What is to be said in words comes from NAME.note.txt, without numbers: these come from the JSON.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import choices_page
import peers_page

from applications.meta_learning.logs import provenance

HERE = Path(__file__).parent
IN_README = "omniglot_5w1s_cpu"


def public(text: str) -> str:
    """A command or name without the folders of the machine that ran it."""
    return re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", text).replace("__main__.py", "imaml")


def read_run(run: Path, evaluations: list[Path]) -> dict[str, Any]:
    """Everything worth keeping of a run."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    environment = json.loads((run / "environment.json").read_text())
    return {
        "environment": {key: public(value) if isinstance(value, str) else value for key, value in environment.items()},
        "config": json.loads((run / "config.json").read_text()),
        "curve": [
            {
                key: entry[key]
                for key in ("step", "seconds", "mean", "interval", "tasks", "query_shots", "inner_residual")
            }
            for entry in entries
            if entry["kind"] == "evaluation"
        ],
        "training": [
            {key: entry[key] for key in ("step", "seconds", "loss", "accuracy", "negative_curvature", "failed")}
            for entry in entries
            if entry["kind"] == "train" and entry["step"] % 100 == 0
        ],
        "evaluations": [json.loads(path.read_text()) for path in evaluations],
    }


def page(name: str, result: dict[str, Any]) -> str:
    """The page of a result, in Markdown."""
    config, environment = result["config"], result["environment"]
    lines = [
        f"# Omniglot, {config['ways']}-way {config['shots']}-shot, on the CPU, {config['outer_steps']:,} outer steps",
        "",
        f"Command: `{environment['command']}`",
        "",
        f"{provenance(environment)}; seed {config['seed']}. Not measured on a GPU yet.",
        "",
        f"Inner problem: the proximal one of the paper, lambda = {config['lam_head']:g} for the last layer and {config['lam']:g} for all "
        "others. These are settings of our own; the presets `omniglot-5w1s-gd` and `omniglot-5w1s-hf` have the paper's.",
        "",
        f"Split: {config['split']}, {config['train_classes']} characters for meta-training, the others held out. "
        f"Batch norm: {environment['batch norm']}. Images: {environment['images']}. Network: {environment['network']}.",
        "",
        f"![Accuracy over steps and minutes]({name}.png)",
        "",
        "## Final test",
        "",
        "| evaluation | accuracy, 95 % interval | tasks | queries per class | failed | inner steps |",
        "|---|---|---|---|---|---|",
    ]
    for evaluation in result["evaluations"]:
        for protocol, row in evaluation["evaluations"].items():
            lines.append(
                f"| {protocol} | {100 * row['mean']:.2f} ± {100 * row['interval']:.2f} % | {row['tasks']} | "
                f"{row['query_shots']} | {row['failed']} | {evaluation['config']['inner_steps']} |"
            )
    lines += [
        "",
        "## During training",
        "",
        "| outer step | minutes | held-out accuracy | inner residual |",
        "|---|---|---|---|",
    ]
    for point in result["curve"]:
        lines.append(
            f"| {point['step']} | {point['seconds'] / 60:.1f} | {100 * point['mean']:.2f} ± {100 * point['interval']:.2f} % "
            f"| {point['inner_residual']:.2g} |"
        )
    share = max((row["negative_curvature"] for row in result["training"]), default=0.0)
    lost = max((row["failed"] for row in result["training"]), default=0.0)
    lines += [
        "",
        f"The curve tests {result['curve'][-1]['tasks']} tasks with {result['curve'][-1]['query_shots']} queries per class; it is watched, "
        "nothing is selected by it. Largest share of tasks with negative curvature in a logged window: "
        f"{100 * share:.1f} %; of failed tasks: {100 * lost:.1f} %.",
        "",
    ]
    return "\n".join(lines) + note(name)


def note(name: str) -> str:
    """The words that go under the numbers of a page."""
    path = HERE / f"{name}.note.txt"
    return "\n" + path.read_text() if path.exists() else ""


def benchmark_page(name: str, rows: dict[str, Any]) -> str:
    """The page of benchmarks/meta_gradient.py, in Markdown."""
    lines = [
        "# One meta-gradient",
        "",
        "| method | seconds, median (fastest .. slowest) | peak memory above the start | tasks at once, outer loss |",
        "|---|---|---|---|",
    ]
    for method, row in rows.items():
        options = row["options"]
        lines.append(
            f"| {method} | {row['seconds']:.3f} ({row['fastest']:.3f} .. {row['slowest']:.3f}) | {row['peak_mb']:.0f} MB | "
            f"{options['chunk_size']}, {options['outer_chunk_size']} |"
        )
    first = next(iter(rows.values()))
    options, environment = first["options"], first["environment"]
    lines += [
        "",
        f"{options['tasks']} tasks {options['ways']}-way {options['shots']}-shot, 15 queries per class, {options['inner_steps']} gradient "
        f"steps and 5 CG steps, float32, {options['threads']} thread. Command: `{public(environment['command'])}` and the like, "
        f"{options['repeats']} repetitions. {provenance(environment)}. Not measured on a GPU yet.",
        "",
    ]
    return "\n".join(lines) + note(name)


def preconditioning_page(name: str, result: dict[str, Any]) -> str:
    """The page of benchmarks/preconditioning.py, in Markdown."""
    rows, environment, options = result["rows"], result["environment"], result["options"]
    labels = list(next(iter(rows.values())))
    lines = [
        "# Preconditioners",
        "",
        "Products until the relative residual is 1e-8, those for building it included.",
        "",
    ]
    lines += [f"| preconditioner of CG | {' | '.join(rows)} |", "|---" * (1 + len(rows)) + "|"]
    for label in labels:
        cells = [
            f"{table[label]['to_residual']:.0f}" + ("" if table[label]["converged"] else " (not reached)")
            for table in rows.values()
        ]
        lines.append(f"| {_code(label)} | {' | '.join(cells)} |")
    lines.append("")
    for spectrum, table in rows.items():
        lines += [
            f"## {spectrum[0].upper()}{spectrum[1:]}",
            "",
            result["spectra"][spectrum],
            "",
            "| preconditioner | products to a residual of 1e-8 | error there | products to an error of 1e-8 | of these, for building |",
            "|---|---|---|---|---|",
        ]
        for label, row in table.items():
            lines.append(
                f"| {_code(label)} | {row['to_residual']:.0f} | {row['error_there']:.1e} | {row['to_error']:.0f} | {row['building']:.0f} |"
            )
        lines.append("")
    lines += [
        f"Random dense matrices of {options['size']} variables with these spectra, float64; residual and error relative; the median of "
        f"{options['seeds']} seeds. The product that confirms the residual is counted. Command: `{public(environment['command'])}`. "
        f"{provenance(environment)}. The counts do not depend on the machine, but for rounding.",
        "",
    ]
    return "\n".join(lines) + note(name)


def logistic_page(name: str, result: dict[str, Any]) -> str:
    """The page of benchmarks/logistic.py, in Markdown."""
    rows, environment, options = result["rows"], result["environment"], result["options"]
    lines = [
        "# The hypergradient of a logistic regression",
        "",
        "![Time of each method](logistic.png)",
        "",
        "1,000 examples, 200 features with one log-penalty each, 5 classes, float64, from a start at zero; every method with the fastest "
        "tolerances at which the relative error of its gradient is at most 1e-6. The methods take turns, each a block of calls, of which "
        "the median counts.",
        "",
        "| method | milliseconds, median | fastest | times that of the first row (quartiles) | error reached | inner, linear tolerance |",
        "|---|---|---|---|---|---|",
    ]
    for method, row in rows.items():
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {method} | {row['milliseconds']:.1f} | {row['fastest']:.1f} | {row['ratio']:.2f} ({low:.2f} .. {high:.2f}) | "
            f"{row['error']:.0e} | {row['tol']:.0e}, {row['rtol']:.0e} |"
        )
    ours = min(row["milliseconds"] for method, row in rows.items() if method.startswith("bilevel"))
    peers = {method: row["milliseconds"] for method, row in rows.items() if not method.startswith("bilevel")}
    torch_peers = [time for method, time in peers.items() if method == "torchopt"]  # by hand is the floor
    lines += [
        "",
        *(
            f"The fastest row of this library takes {ours / time:.2f} times the time of *{method}*."
            for method, time in peers.items()
        ),
        f"Target: at most 15 ms, {_reached(ours <= 15)}; and a third of the time of TorchOpt, "
        f"{_reached(bool(torch_peers) and 3 * ours <= min(torch_peers))}; and level with jitted JAXopt, "
        f"{_reached('jaxopt' in peers and ours <= peers['jaxopt'])}. [What the time is spent on](shares.md).",
        "",
        peers_page.versions(rows),
        "",
        f"{options['repeats']} repetitions, {options['threads']} threads, seed {options['seed']}. Command: "
        f"`{public(environment['command'])}`. {provenance(environment)}.",
        "",
    ]
    return "\n".join(lines) + note(name)


def judged_together(name: str, result: dict[str, Any]) -> str:
    """The page of benchmarks/judged_together.py, in Markdown; docs/own_images.md takes the table from between the marks."""
    options, config, environment = result["options"], result["config"], result["environment"]
    lines = [
        "# How much an answer depends on the images beside it",
        "",
        "Batch norm takes its mean and variance from the images at hand (transductive). Accuracy in percent, with the 95 % interval "
        f"over the tasks: {options['trials']} tasks of {config['ways']} classes that were held out, {config['shots']} support image of "
        f"each, the others to be classified; meta-trained in {config['outer_steps']} steps of {config['meta_batch']} tasks on "
        "generated characters.",
        "",
        "<!-- table -->",
        "",
        "| images given at once | alone | with the support images beside them |",
        "|---|---|---|",
        *(
            f"| {kind} | " + " | ".join(f"{each['mean']:.1f} ± {each['half']:.1f}" for each in row) + " |"
            for kind, row in result["rows"].items()
        ),
        "",
        "<!-- end of table -->",
        "",
        f"Split: random, {options['train']} characters for meta-training, {options['test']} held out. Command: "
        f"`{public(environment['command'])}`, seed {options['seed']}. {provenance(environment)}.",
        "",
    ]
    return "\n".join(lines) + note(name)


def floor(name: str, result: dict[str, Any]) -> str:
    """The page of benchmarks/floor.py, in Markdown."""
    options, environment = result["options"], result["environment"]
    titles = {
        "A": "A: 16 tasks 5-way 1-shot, this processor",
        "B": "B: 2 tasks 20-way 5-shot, this processor",
        "5w1s": f"a meta-step of {options['tasks']} tasks 5-way 1-shot, H200",
        "20w5s": f"a meta-step of {options['tasks']} tasks 20-way 5-shot, H200",
    }
    lines = [
        "# What a meta-gradient takes at least",
        "",
        "The operations of products and convolutions at the rate of a large product, and what all operators read and write, one after "
        "the other, at the rate of a large copy. One does not exclude the other, so the floor of this composition is the larger of both; "
        "fusing operators would lower the second.",
        "",
        "| work | operations | bytes | operators | operations take | bytes take | measured here |",
        "|---|---|---|---|---|---|---|",
    ]
    measured = json.loads((HERE / "few_shot.json").read_text())["works"]
    for work, row in result["rows"].items():
        least = max(row["compute_ms"], row["memory_ms"])
        if work in measured:
            ours = [row for name, row in measured[work]["rows"].items() if name.startswith("bilevel")]
            took = min(row["cpu_milliseconds"] for row in ours)
            reached = f"{took:,.0f} ms, {took / least:.1f} times the larger"
        else:
            reached = f"not measured on a GPU yet; target {row['target_ms']:g} ms, {row['target_ms'] / least:.1f} times the larger"
        lines.append(
            f"| {titles[work]} | {row['operations'] / 1e9:,.0f} GFLOP | {row['bytes'] / 1e9:,.1f} GB | {row['operators']:,} | "
            f"{row['compute_ms']:,.1f} ms | {row['memory_ms']:,.1f} ms | {reached} |"
        )
    here, there = result["rows"]["A"], result["rows"]["5w1s"]
    lines += [
        "",
        f"Rates: this processor, one thread, measured, {here['operations_per_ms'] / 1e6:,.0f} GFLOP/s and "
        f"{here['bytes_per_ms'] / 1e6:,.1f} GB/s; an H200, from its data sheet, {there['operations_per_ms'] / 1e9:,.0f} TFLOP/s in "
        f"float32 and {there['bytes_per_ms'] / 1e9:.1f} TB/s. The GPU's works are counted "
        f"with {options['counted']} tasks and multiplied. The times "
        "measured here are those of [one meta-gradient beside its peers](few_shot.md).",
        "",
        f"Command: `{public(environment['command'])}`. {provenance(environment)}.",
        "",
    ]
    return "\n".join(lines) + note(name)


def choices(name: str, result: dict[str, Any]) -> str:
    """The page of benchmarks/choices.py, in Markdown."""
    return choices_page.page(result) + note(name)


def beside_peers(name: str, result: dict[str, Any]) -> str:
    """The page of a benchmark that runs the peers too, in Markdown."""
    return str(getattr(peers_page, name)(result)) + note(name)


def _reached(yes: bool) -> str:
    return "reached" if yes else "**not reached**"


def _code(label: str) -> str:
    """Code for what is code."""
    expression = re.match(r"\w+\(.*?\)", label)
    return f"`{expression[0]}`{label[len(expression[0]) :]}" if expression else label


def shares(name: str, result: dict[str, Any]) -> str:
    """The page of benchmarks/shares.py, in Markdown."""
    options, environment = result["options"], result["environment"]
    titles = {
        "A": "A: [16 tasks 5-way 1-shot](few_shot.md)",
        "B": "B: [2 tasks 20-way 5-shot](few_shot.md)",
        "C": "C: [one small quadratic](quadratic.md), `quadratic=True, compile=True`",
        "D": "D: [a logistic regression](logistic.md), `compile=True`",
    }
    kinds = list(next(iter(result["rows"].values()))["bilevel"]["shares"])
    lines = [
        "# What the time is spent on",
        "",
        "Works that miss an aim in speed, beside the same work by hand in PyTorch: the shares of a call's time within kinds of "
        "operators and between them (Python, autograd's bookkeeping), from the profiler of PyTorch, which costs about a microsecond for "
        "each operator. The milliseconds are without it, each method by itself in a warm process; the pages of the works have them in "
        "turn with the peers, and differ, because the speed of this machine does from hour to hour. Operators are counted with views and "
        "with those that they call; [the floor](floor.md) counts those that do work.",
        "",
        f"| work | | milliseconds | operators | threads | {' | '.join(kinds)} |",
        "|---|---|---|---|---|" + "---|" * len(kinds),
    ]
    for work, methods in result["rows"].items():
        for method, row in methods.items():
            cells = " | ".join(f"{100 * row['shares'][each]:.0f} %" for each in kinds)
            lines.append(
                f"| {titles[work]} | {method} | {row['milliseconds']:,.1f} | {row['operators']:,} | {row['threads']} | {cells} |"
            )
    lines += [
        "",
        f"Each time: the median of at least {options['seconds']:g} s of calls. Command: `{public(environment['command'])}`. "
        f"{provenance(environment)}.",
        "",
    ]
    return "\n".join(lines) + note(name)


BENCHMARKS = {
    "batch": beside_peers,
    "choices": choices,
    "few_shot": beside_peers,
    "floor": floor,
    "judged_together": judged_together,
    "logistic": logistic_page,
    "meta_gradient": benchmark_page,
    "preconditioning": preconditioning_page,
    "quadratic": beside_peers,
    "scaling": beside_peers,
    "shares": shares,
}


def draw(name: str, result: dict[str, Any]) -> None:
    """The figure of a benchmark that does not draw its own."""
    path = HERE / f"{name}.png"
    if name == "choices":
        choices_page.draw(result, path)
    elif name == "logistic":
        peers_page.draw({"": result["rows"]}, path, "milliseconds")
    elif name in ("batch", "few_shot", "quadratic"):
        peers_page.draw(peers_page.tables(result), path)


def readme_table(name: str, result: dict[str, Any]) -> str:
    """What the README says of a result, between its two marks."""
    environment, minutes, config = result["environment"], result["training"][-1]["seconds"] / 60, result["config"]
    cores = "one core" if environment["threads"] == 1 else f"{environment['threads']} cores"
    rows = [
        f"| {protocol} | {100 * row['mean']:.2f} ± {100 * row['interval']:.2f} % | {row['tasks']} | {row['query_shots']} |"
        for protocol, row in result["evaluations"][0]["evaluations"].items()
    ]
    table = [
        f"Real Omniglot, 5-way 1-shot, characters that training never saw ({config['split']} split, {config['train_classes']:,} for "
        f"training), after {minutes:.0f} minutes of training on {cores} of an {environment['processor']} processor (seed "
        f"{config['seed']}; transductive batch norm; `{public(environment['command'])}`; curve and caveats are "
        f"[on this page](docs/results/{name}.md)):",
        "",
        "| protocol | accuracy, 95 % interval | test tasks | queries per class |",
        "|---|---|---|---|",
        *rows,
        "",
        "Not measured on a GPU yet.",
    ]
    return "<!-- results -->\n" + "\n".join(table) + "\n<!-- end of results -->"


def into_readme(name: str, result: dict[str, Any]) -> None:
    """Put it there."""
    readme = HERE.parents[1] / "README.md"
    before, rest = readme.read_text().split("<!-- results -->\n", 1)
    readme.write_text(before + readme_table(name, result) + rest.split("<!-- end of results -->", 1)[1])


def main() -> None:
    """The command line."""
    if sys.argv[1] in ("benchmark", "page"):
        name = sys.argv[2]
        result = json.loads((HERE / f"{name}.json").read_text())
        if sys.argv[1] == "benchmark":
            draw(name, result)
        make = BENCHMARKS[name] if sys.argv[1] == "benchmark" else page
        (HERE / f"{name}.md").write_text(make(name, result))
        return
    run, name, evaluations = Path(sys.argv[2]), sys.argv[3], [Path(arg) for arg in sys.argv[4:]]
    result = read_run(run, evaluations)
    (HERE / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.copy(run / "curves.png", HERE / f"{name}.png")
    (HERE / f"{name}.md").write_text(page(name, result))
    if name == IN_README:
        into_readme(name, result)


if __name__ == "__main__":
    main()
