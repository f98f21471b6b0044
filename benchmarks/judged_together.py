"""How much does the answer for an image depend on the images beside it? Batch norm takes its statistics from those at hand.

    python benchmarks/judged_together.py [--trials 50] [--outer-steps 400] [--json docs/results/judged_together.json]

Draws a folder of characters (60 classes of 24 images), meta-trains on it as `imaml train --dataset folder` does, and classifies images
of classes that it held out, with `predict` as `imaml predict` does: five classes, one support image of each, 15 others of each to
classify; all at once, one of a class at a time, or those of one class at a time, each without and with the support images beside them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import extras  # noqa: F401 - says what to install
import torch
from PIL import Image
from turns import environment

from applications.meta_learning.checkpoint import load_checkpoint
from applications.meta_learning.cli import app
from applications.meta_learning.data import generate_glyphs
from applications.meta_learning.predict import predict

CLASSES, IMAGES, SIZE, WAYS, QUERIES = 60, 24, 28, 5, 15


def write_folder(folder: Path, seed: int) -> None:
    """``class/image.png``, dark on light."""
    for number, drawings in enumerate(generate_glyphs(CLASSES, IMAGES, seed=seed, size=SIZE).images):
        (folder / f"character{number:03d}").mkdir(parents=True)
        for k, drawing in enumerate(drawings):
            Image.fromarray(255 - drawing.numpy()).save(folder / f"character{number:03d}" / f"{k:02d}.png")


def train(images: Path, run: Path, args: argparse.Namespace) -> None:
    """By the program itself."""
    options = {
        "channels": 32,
        "image-size": SIZE,
        "colours": "grey",
        "outer-steps": args.outer_steps,
        "seed": args.seed,
    }
    command = ["train", "--dataset", "folder", "--data-dir", str(images), "--out", str(run), "--threads", "1"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    app([*command, "--no-final-test", "--no-tensorboard"], standalone_mode=False)


def shares(run: Path, images: Path, scratch: Path, rng: random.Random) -> dict[str, list[float]]:
    """One task of held-out classes: for each way of giving the images, the share in percent that is right, alone and beside the support."""
    stored = load_checkpoint(run)
    chosen = sorted(stored["classes"][i] for i in rng.sample(list(stored["split"]["test"]), WAYS))
    queries: dict[str, list[Path]] = {}
    support = scratch / "support"
    for name in chosen:
        files = sorted((images / name).iterdir())
        rng.shuffle(files)
        (support / name).mkdir(parents=True)
        shutil.copy(files[0], support / name)
        queries[name] = files[1 : 1 + QUERIES]
    beside = sorted(support.rglob("*.png"))
    groups = {
        f"{WAYS * QUERIES}, {QUERIES} of each class": [[file for files in queries.values() for file in files]],
        "one": [files[:1] for files in queries.values()],
        f"{QUERIES}, all of one class": list(queries.values()),
    }
    found: dict[str, list[float]] = {}
    for kind, each in groups.items():
        for extra in ([], beside):
            right = []
            for group in each:
                answer = predict(run, support, [*group, *extra])
                labels = zip(answer.files[: len(group)], answer.labels, strict=False)
                right += [file.parent.name == label for file, label in labels]
            found.setdefault(kind, []).append(100 * statistics.mean(right))
    shutil.rmtree(support)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=50, help="tasks to judge")
    parser.add_argument("--outer-steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, found = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        images, run = Path(scratch, "images"), Path(scratch, "run")
        write_folder(images, args.seed)
        train(images, run, args)
        config, split = load_checkpoint(run)["config"], load_checkpoint(run)["split"]
        for number in range(args.trials):
            found.append(shares(run, images, Path(scratch, f"task{number}"), rng))
    rows: dict[str, Any] = {
        kind: [
            {"mean": statistics.mean(values), "half": 1.96 * statistics.stdev(values) / len(values) ** 0.5}
            for values in zip(*(task[kind] for task in found), strict=True)
        ]
        for kind in found[0]
    }
    for kind, (alone, beside) in rows.items():
        print(f"{kind:28}{alone['mean']:6.1f} ± {alone['half']:.1f}{beside['mean']:8.1f} ± {beside['half']:.1f}")
    if args.json:
        facts = {"trials": args.trials, "seed": args.seed, "train": len(split["train"]), "test": len(split["test"])}
        result = {"rows": rows, "options": facts, "config": config, "environment": environment()}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
