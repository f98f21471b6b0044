"""Turn the folder of a training run into a result that can be committed: JSON, a figure, and the page made from the JSON.

    python docs/results/publish.py RUN NAME [EVALUATION.json ...]

RUN is the folder of ``imaml train``; each EVALUATION is what ``imaml evaluate RUN --json`` printed. Writes NAME.json, NAME.png and
NAME.md beside this file. No number in the page is typed by hand.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def public(text: str) -> str:
    """A command or name without the folders of the machine that ran it."""
    return re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", text).replace("__main__.py", "imaml")


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
        f"# Omniglot, {config['ways']}-way {config['shots']}-shot, on the CPU",
        "",
        f"Command: `{environment['command']}`",
        "",
        f"Hardware: {environment['processor']}, {environment['threads']} threads; torch {environment['torch']}; "
        f"commit `{environment['commit'][:12]}`; seed {config['seed']}. Not measured on a GPU yet.",
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
    note = HERE / f"{name}.note.md"
    return "\n".join(lines) + ("\n" + note.read_text() if note.exists() else "")


def main() -> None:
    """The command line."""
    run, name, evaluations = Path(sys.argv[1]), sys.argv[2], [Path(arg) for arg in sys.argv[3:]]
    result = read_run(run, evaluations)
    (HERE / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.copy(run / "curves.png", HERE / f"{name}.png")
    (HERE / f"{name}.md").write_text(page(name, result))


if __name__ == "__main__":
    main()
