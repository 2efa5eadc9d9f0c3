"""What Kronecker factors are worth as the metric of trust regions: work and CPU seconds until a loss is reached.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.trust_metric -data_dir DATA -json build/trust_metric.json

Work is in gradients of all samples, refreshes of the metric with it; each run may take the same. All settings but those
of the table's columns are the defaults of the methods.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po

#: Hidden widths, loss to be reached, and the loss itself.
CASES: dict[str, tuple[tuple[int, ...], float, Any]] = {
    "classifier": ((100, 100), 0.05, nn.functional.cross_entropy),
    "autoencoder": ((120, 60, 30, 10, 30, 60, 120), 1.4, nna.SquaredError()),
}
BATCH = {"batch": 400, "global_it": 0, "data": 4}
#: Method, and settings beside the metric.
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "TR, first order": (po.TrustRegionMinimizer, {"model": "first"}),
    "TR, L-SR1": (po.TrustRegionMinimizer, {"model": "lsr1"}),
    "TR, Hessian products": (po.TrustRegionMinimizer, {"model": "hvp"}),
    "TR, first order, batches of 400": (po.TrustRegionMinimizer, {"model": "first", "batch": 400}),
    "APTS, 4 parts of batches of 400": (po.APTS, {"model": "first", **BATCH}),
    "APTS, parts of the weights": (po.APTS, {"model": "lsr1", "weights": 3}),
}


def network(case: str, pixels: int) -> nn.Sequential:
    """The network of a case, tanh between its layers."""
    torch.manual_seed(0)
    widths = CASES[case][0]
    sizes = [pixels, *widths, 10 if case == "classifier" else pixels]
    parts = [each for a, b in pairwise(sizes) for each in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts[:-1])


def run(case: str, method: str, metric: str, x: Tensor, y: Tensor, work: float) -> dict[str, Any]:
    """One run: where it first reached the loss, what it had at the end, and what it took."""
    _, target, loss = CASES[case]
    kind, words = METHODS[method]
    f = nna.NetworkLoss(network(case, x.shape[1]), loss, x, y if case == "classifier" else x, precision=torch.float32)
    reached, begin = [], time.process_time()

    def look(minimizer: Any, history: po.History) -> None:
        value = minimizer.f if not minimizer.settings.batch else _quietly(f, minimizer.x)
        if value <= target and not reached:
            reached.append((history[-1].iteration, history[-1].work, time.process_time() - begin))

    solver = kind(f, metric=metric, max_work=work, gtol=0.0, max_it=10**6, **words)
    result = solver.minimize(f.parameters(), observers=[look])
    steps, spent, seconds = reached[0] if reached else (None, None, None)
    return {
        "case": case,
        "method": method,
        "metric": metric,
        "steps": steps,
        "work": spent,
        "seconds": seconds,
        "last": f.evaluate_value(result.design),
        "all_seconds": time.process_time() - begin,
    }


def _quietly(f: nna.NetworkLoss, x: Tensor) -> float:
    """The loss of all samples, which the method has not asked for: not counted."""
    return f.evaluate_value(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-data_dir", default="")
    parser.add_argument("-samples", type=int, default=4096)
    parser.add_argument("-work", type=float, default=200.0, help="full gradients that a run may take")
    parser.add_argument("-json", default="")
    own = parser.parse_args()
    data = nna.load_dataset("mnist" if own.data_dir else "digits", own.data_dir)
    pooled = nn.functional.avg_pool2d(data.x_train[: own.samples], 2 if own.data_dir else 1)
    x, y = pooled.flatten(1).float(), data.y_train[: own.samples]
    rows = []
    for case in CASES:
        for method in METHODS:
            for metric in ("none", "kfac"):
                rows.append(found := run(case, method, metric, x, y, own.work))
                print(
                    " | ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in found.values()),
                    flush=True,
                )
    if own.json:
        with open(own.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
