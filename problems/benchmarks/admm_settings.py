"""Training by splitting, the stream of batches: what each of its parts is worth, one changed at a time.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.admm_settings -data_dir DATA -json build/admm_settings.json

Test accuracies of the networks of `problems.admm_mnist` on digits, HAR and Peaks, after the default epochs; means over
seeds, and the worst of them.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from problems.benchmarks.admm_accuracy import Problem, by_admm
from problems.benchmarks.processes import Row, plain, table, write

#: Settings that replace the defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no momentum": {"momentum": 0.0},
    "Gram matrices of one batch": {"forgetting": 0.0},
    "no share of the states' mean square in the ridge": {"ridge_share": 0.0},
    "increments not scaled, step 3": {"scaling": "none", "step": 3.0},
    "step 0.2": {"step": 0.2},
    "softness 0.1": {"softness": 0.1},
    "softness 1": {"softness": 1.0},
    "loss cross_entropy": {"loss": "cross_entropy"},
}

SETS = ("digits", "har", "peaks")


def main(argv: list[str] | None = None) -> list[Row]:
    """Run all variants, print the table, write the rows where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-data_dir", required=True, help="folder of the data sets")
    parser.add_argument("-sets", nargs="+", choices=SETS, default=list(SETS), help="these data sets alone")
    parser.add_argument("-seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("-json", default="", help="write the rows to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    problems = {name: Problem(name, options.data_dir) for name in options.sets}
    rows: list[Row] = []
    lines: dict[str, list[float]] = {}
    for variant, split in VARIANTS.items():
        lines[variant] = []
        for name, problem in problems.items():
            found = [accuracy(problem, split, seed) for seed in range(options.seeds)]
            lines[variant] += [statistics.fmean(found), min(found)]
            rows.append(plain(f"{name}: {variant}, mean", statistics.fmean(found), "%"))
            write(options.json, rows)
    table("test accuracy, %", [f"{name}, {what}" for name in problems for what in ("mean", "worst")], lines)
    return rows


def accuracy(problem: Problem, split: dict[str, Any], seed: int) -> float:
    """In percent, after the default epochs; a run whose numbers are no longer finite has its last good weights."""
    curve = by_admm(problem, "streaming", "forward", seed, problem.epochs, split=split)
    return 100.0 * curve[-1].test_accuracy


if __name__ == "__main__":
    main()
