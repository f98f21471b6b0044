"""On a machine with a GPU: the tests, the benchmarks, and Table 2 of the paper, in this order.

    python benchmarks/gpu.py [--out gpu-results] [--data-dir OMNIGLOT] [--minutes M] [--slices N] [--cells NAME ...] [--dry-run]

It works in slices of at most ten minutes, each a process of its own, and goes on where it was when it is called again: what is done is in
the folder, and a training goes on from its checkpoint. The folder holds everything worth keeping: a JSON file for each part, the report of
the tests, the runs with their checkpoints, and gpu.md, which is made from the JSON alone. Everything is without TF32, except where its
error is measured. Table 2 needs Omniglot: without ``--data-dir`` or ``BILEVEL_OMNIGLOT`` it is left out, and the exit code says so.
``--dry-run``: tiny sizes on a CPU, to see that it works; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import extras  # noqa: F401 - says what to install
import torch
from gpu_parts import PARTS, WORKS, Setting, tensor_float_32

from applications.meta_learning.experiments import EXPERIMENTS
from applications.meta_learning.experiments.base import table
from applications.meta_learning.logs import environment, write_atomically, write_json

ROOT = Path(__file__).parents[1]
SLICE = 540.0  # seconds, and some more until a training has written its checkpoint
GRACE = 50.0
SHORTEST = 30.0  # a slice that would have less is not begun
TABLE = "e4_omniglot"
INTERRUPTED = 130
TESTS = [path for path in sorted((ROOT / "tests").glob("**/test_*.py")) if "mark.cuda" in path.read_text()]


class Runner:
    """The parts in their order; each has a file NAME.json once it is done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.dry_run, self.seed = args.out.resolve(), args.dry_run, args.seed
        data_dir = args.data_dir or (
            Path(os.environ["BILEVEL_OMNIGLOT"]) if os.environ.get("BILEVEL_OMNIGLOT") else None
        )
        self.data_dir, self.slices = data_dir and data_dir.resolve(), args.slices
        self.end = time.time() + 60 * (float("inf") if args.minutes is None else args.minutes)
        cells = next(e for e in EXPERIMENTS if e.name == TABLE).cells
        self.cells = args.cells or (cells[:1] if self.dry_run else cells)
        self.lacks_data = self.data_dir is None and not self.dry_run
        self.out.mkdir(parents=True, exist_ok=True)

    def commands(self) -> dict[str, list[str]]:
        """What to run for each part."""
        python, found = sys.executable, {}
        pytest = [python, "-m", "pytest", "-m", "cuda", "-q", "-rA", "-p", "no:cacheprovider"]
        for path in TESTS[:1] if self.dry_run else TESTS:
            found[f"tests-{path.stem}"] = [*pytest, *([] if self.dry_run else ["-n", "8"]), str(path)]
        flags = ["--out", str(self.out), "--seed", str(self.seed), *(["--dry-run"] if self.dry_run else [])]
        for work in list(WORKS)[:1] if self.dry_run else WORKS:
            for part in PARTS:
                found[f"{work}-{part}"] = [python, __file__, "--measure", work, part, *flags]
        for cell in () if self.lacks_data else self.cells:
            command = [python, "-m", "applications.meta_learning", "experiment", TABLE, "--only", cell]
            command += ["--out", str(self.out / TABLE), "--seed", str(self.seed)]
            command += ["--quick"] if self.dry_run else []
            found[f"cell-{cell}"] = command + (["--data-dir", str(self.data_dir)] if self.data_dir else [])
        return found

    def path(self, name: str) -> Path:
        """The file that says that a part is done."""
        return self.out / f"{name}.json"

    def run(self) -> int:
        """Run what is not done, slice by slice; the exit code."""
        commands, codes, taken = self.commands(), [], 0
        if self.lacks_data:
            print("Table 2 is left out: name the folder of Omniglot with --data-dir or BILEVEL_OMNIGLOT", flush=True)
            codes.append(2)
        for name, command in commands.items():
            while not self.path(name).exists():
                left = self.end - time.time() - GRACE
                if taken == self.slices or left < SHORTEST:
                    print(f"{taken} slices done; the same command goes on with {name}", flush=True)
                    return max(codes, default=0)
                code, taken = self.slice(name, command, min(SLICE, left)), taken + 1
                over = self.end - time.time() - GRACE < SHORTEST  # then it was asked to stop
                codes.append(0 if over or code == INTERRUPTED else abs(code))  # negative: a signal
                if codes[-1]:
                    break  # the other parts do not need it
            self.write_page(commands)
        return max(codes, default=0)

    def slice(self, name: str, command: list[str], limit: float) -> int:
        """One process; it is asked to stop when its time, so many seconds, is over."""
        begun, log = time.time(), self.out / f"{name}.txt"
        print(f"{name} ...", flush=True)
        with log.open("a") as file:
            # under nohup, or in the background of a script, SIGINT is ignored, and children inherit that
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                try:
                    code = process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    code = process.wait() or 1
        seconds = time.time() - begun
        print(f"{name}: exit code {code} after {seconds:.0f} s", flush=True)
        if code == 0 and not self.path(name).exists():  # a measurement writes its own
            write_json(self.path(name), {"seconds": seconds, "last": log.read_text().splitlines()[-1:]})
        return code

    def write_page(self, commands: dict[str, list[str]]) -> None:
        """gpu.md."""
        done = {name: json.loads(self.path(name).read_text()) for name in commands if self.path(name).exists()}
        write_atomically(self.out / "gpu.md", "\n".join(page(done, len(commands), self.dry_run)) + "\n")


def measure(work: str, part: str, args: argparse.Namespace) -> None:
    """One part, in this process."""
    device = torch.device("cpu" if args.dry_run else "cuda")
    with tensor_float_32(False):
        numbers = PARTS[part](Setting(work, device, args.dry_run, args.seed))
    facts = {**environment(device), "command": f"python benchmarks/gpu.py --measure {work} {part}"}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{work}-{part}.json", {"environment": facts, "seed": args.seed, "result": numbers})


def page(done: dict[str, Any], count: int, dry_run: bool) -> list[str]:
    """What was measured, as Markdown."""
    lines = ["# On a GPU", ""]
    if dry_run:
        lines += [
            "**A trial on a CPU with tiny sizes: these numbers show that the script works, and nothing else.**",
            "",
        ]
    lines += [f"{len(done)} of {count} parts are done.", ""]
    lines += [f"- {name}: {' '.join(stored['last'])}" for name, stored in done.items() if name.startswith("tests-")]
    lines += [""]
    for work in WORKS:
        parts = {part: done[f"{work}-{part}"] for part in PARTS if f"{work}-{part}" in done}
        if parts:
            facts = next(iter(parts.values()))["environment"]
            device = f"{facts['device']}, torch {facts['torch']}, commit `{str(facts['commit'])[:12]}`"
            lines += [f"## {work}", "", f"Device: {device}.", ""]
        for part, stored in parts.items():
            lines += [*SECTIONS[part](stored["result"]), ""]
    cells = [name.removeprefix("cell-") for name in done if name.startswith("cell-")]
    if cells:
        lines += ["## Table 2", "", f"Trained: {', '.join(cells)}. The page is {TABLE}/{TABLE}.md.", ""]
    return lines


def _meta_step(result: Any) -> list[str]:
    times, floor = result["milliseconds"], result["floor"]
    rows = [[name, _ms(own)] for name, own in times.items()]
    names = ("compute_ms", "memory_ms", "launch_ms", "launch_in_graph_ms")
    words = ("operations at the rate of a product", "bytes at the rate of a copy", "launches", "launches in a graph")
    why = times["captured"]["why_not"]
    reached = times["captured"]["median"] <= result["target_ms"]
    return [
        *table(["a whole meta-step", "milliseconds (quartiles)"], rows),
        "",
        f"Aim: {result['target_ms']:g} ms ({'reached' if reached else 'not reached'}); {result['target_times']:g} times the loop over "
        f"the tasks by hand, measured: {result['times_faster_than_loop']:.1f} times. "
        + (f"Nothing was captured: {why}. " if why else "")
        + f"The meta-gradients of both differ by {result['error_to_loop']:.1e} in float64.",
        "",
        *table(["at least", "milliseconds"], [[word, f"{floor[n]:.3g}"] for word, n in zip(words, names, strict=True)]),
        "",
        f"{floor['operations'] / 1e9:.4g} GFLOP, {floor['bytes'] / 1e9:.4g} GB, {floor['operators']} operators.",
    ]


def _memory(result: Any) -> list[str]:
    def mib(value: float | None) -> str:
        return "–" if value is None else f"{value:.0f}"

    rows = [[str(row["inner_steps"]), mib(row["peak_mib"]), mib(row["captured_mib"])] for row in result["rows"]]
    return table(["inner steps", "peak memory of a step, MiB", "memory that its graph keeps, MiB"], rows)


def _precision(result: Any) -> list[str]:
    rows = [
        [row["precision"], f"{row['relative_error']:.1e}", f"{1 - row['cosine']:.1e}", _ms(row["milliseconds"])]
        for row in result["rows"]
    ]
    header = [
        "products and convolutions in",
        "relative error of the meta-gradient",
        "1 - cosine",
        "milliseconds (quartiles)",
    ]
    return table(header, rows)


def _throughput(result: Any) -> list[str]:
    rows = [[str(row["tasks"]), f"{row['tasks_per_second']:.0f}", _ms(row["milliseconds"])] for row in result["rows"]]
    return table(["tasks at once", "tasks per second", "milliseconds (quartiles)"], rows)


SECTIONS = {"meta_step": _meta_step, "memory": _memory, "precision": _precision, "throughput": _throughput}


def _ms(times: Any) -> str:
    return f"{times['median']:.3g} ({times['quartiles'][0]:.3g} .. {times['quartiles'][1]:.3g})"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--data-dir", type=Path, help="folder of Omniglot, for Table 2; default: BILEVEL_OMNIGLOT")
    parser.add_argument(
        "--minutes", type=float, help="stop after so many minutes, the checkpoint of a training written"
    )
    parser.add_argument("--slices", type=int, help="stop after so many slices of at most ten minutes")
    parser.add_argument("--cells", nargs="+", help="the cells of Table 2 to train; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--measure", nargs=2, metavar=("WORK", "PART"), help="one part, in this process")
    args = parser.parse_args(argv)
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error(
            f"expected a CUDA device, and there is none (torch {torch.__version__}, CUDA {torch.version.cuda}; an older driver "
            "means none, and TORCH_INDEX of the Makefile chooses another build); --dry-run tries the script on the CPU"
        )
    if args.measure:
        measure(*args.measure, args)
        return 0
    return Runner(args).run()


if __name__ == "__main__":
    assert set(SECTIONS) == set(PARTS)
    sys.exit(main())
