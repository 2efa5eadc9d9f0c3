"""A transformer of 32 blocks on four ranks: its loss curve by the default controller, and its time by the model.

python -m problems.benchmarks.transformer model           # seconds of a gradient, predicted from measured costs
python -m problems.benchmarks.transformer whole A         # the same over all batches of a run, from its summary
python -m problems.benchmarks.transformer curve A B       # summaries of two runs of problems.transformer: their losses
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import nn_adapters as nna
from nn_adapters.layers import EncoderBlock
from nn_adapters.layers.parts.intervalfit import FittedSteps, IntervalFit
from pdeopt.steps.transfer import level_offsets, whole_intervals
from problems.benchmarks.fused import milliseconds
from problems.benchmarks.layer_model import LayerClocks, LayerCosts, schedule

LAYERS, RANKS = 32, 4

#: Long steps, coarsening factor, forward and adjoint cycles.
SETTINGS = [
    (kind, factor, *cycles)
    for kind, factors in (("stages", (4, 8)), ("fitted", (4, 8)))
    for factor in factors
    for cycles in ((0, 0), (1, 0), (1, 1), (2, 1), (2, 2))
]


@dataclass(frozen=True)
class LongCosts:
    """A long step, forward and back, in evaluations of a layer; seconds of learning one interval in a batch."""

    forward: float = 2.0
    adjoint: float = 2.0
    learning: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """Of a block, causal, and its features."""

    width: int = 64
    heads: int = 4
    hidden: int = 128
    batch: int = 16
    tokens: int = 32

    def level(self, rows: int) -> tuple[nna.LayerParallel, nna.layers.LinearizedSteps]:
        """Layers of their own, ready for derivatives."""
        network = nna.LayerParallel(
            None, lambda: EncoderBlock(self.width, self.heads, self.hidden, causal=True), rows, float(rows)
        )
        return network, network.step.linearize(list(network.stacks), (), lambda rows: 1.0)

    def states(self, rows: int) -> torch.Tensor:
        """Features of so many layers."""
        return torch.randn(rows, self.batch, self.tokens, self.width)


def costs(sizes: Sizes = Sizes()) -> LayerCosts:
    """Measured costs of a call of causal blocks and of a block in it: forward, and back by states alone."""
    found = {}
    for rows in (1, 8):
        _, level = sizes.level(rows)
        u, everything = sizes.states(rows), slice(None)
        level.remember(u, everything)
        found[rows] = least(level.advance, u, everything), least(level.pullback, u, everything)
    slopes = [(many - one) / 7 for one, many in zip(found[1], found[8])]
    ways = [(max(one - slope, 0.0), slope) for one, slope in zip(found[1], slopes)]
    return LayerCosts(*ways, width=sizes.width, batch=sizes.batch * sizes.tokens)


def fitted_costs(found: LayerCosts, sizes: Sizes = Sizes()) -> LongCosts:
    """Measured costs of a fitted long step.

    Args:
        found: costs of a layer.
        sizes: of it.
    """
    _, level = sizes.level(1)
    u, v, e = (sizes.states(1) for _ in range(3))
    fit, everything = IntervalFit().learned((u, v, e), -1), slice(None)
    steps = FittedSteps(level, fit, -1)
    steps.states = u
    steps.pullback(v, everything)  # remembers
    forward, back = least(steps.advance, u, everything), least(steps.pullback, v, everything)
    learning = least(lambda: fit.learned((u, v, e), -1).maps)
    return LongCosts(forward / sum(found.forward), back / sum(found.adjoint), learning)


@torch.no_grad()
def least(call: Callable[..., object], *arguments: object) -> float:
    """The least CPU seconds of many calls."""
    return min(1e-3 * milliseconds(call, *arguments) for _ in range(10))


def model() -> None:
    """Print seconds of value and gradient on one rank in series, and on four by settings."""
    torch.set_num_threads(1)
    found = costs()
    kinds, serial = {"stages": LongCosts(), "fitted": fitted_costs(found)}, seconds(1, None, 0, 0, found)
    own = kinds["fitted"]
    print(f"a fitted step: {own.forward:.2f} and {own.adjoint:.2f} of a layer, taught in {1e3 * own.learning:.1f} ms")
    print(f"{LAYERS} blocks in series: {1e3 * serial:.0f} ms; on {RANKS} ranks, predicted:")
    for kind, factor, cycles, adjoint in SETTINGS:
        each = seconds(RANKS, factor, cycles, adjoint, found, kinds[kind])
        print(f"{kind}, factor {factor}, cycles {cycles}/{adjoint}: {1e3 * each:.0f} ms, {serial / each:.2f}x")


def seconds(
    ranks: int, factor: int | None, cycles: int, adjoint: int, found: LayerCosts, long: LongCosts = LongCosts()
) -> float:
    """Predicted, of value and gradient.

    The last run by the adjoint costs two of its layers, for the gradients of states and of weights. On coarse levels
    the adjoint begins with the states of its steps, a forward evaluation of each.
    """
    settings = nna.MgritSettings(1) if factor is None else nna.MgritSettings(2, str(factor))
    factors = settings.factors(LAYERS)
    levels = level_offsets(whole_intervals(LAYERS, factors, ranks), factors)
    ways = (found.forward, cycles, long.forward), (found.adjoint, adjoint, long.adjoint)
    clocks = [
        schedule(LayerClocks(ranks, way, found.message), levels, factors, settings, count, stages=stages)
        for way, count, stages in ways
    ]
    own = int(np.diff(levels[0][0]).max())
    weights = (factors[0] if factors else own) * found.adjoint[0] + own * found.adjoint[1]
    intervals = int(np.diff(levels[1][0]).max()) if factors else 0
    again = intervals * (long.forward * sum(found.forward) + long.learning)
    return sum(float(each.time.max()) for each in clocks) + weights + again


def whole(file: str) -> float:
    """Print the cycles of a run on four ranks by batches, and how many times faster than in series it is predicted.

    A measured gradient costs one in series beside one by the cycles. Cycles change between measurements, too: what
    counts are those at either end that cost more.
    """
    summary = json.loads(Path(file).read_text())
    parameters, bias, (factor,) = summary["parameters"], summary["bias"], summary["coarsening"]
    batches = summary["epochs"] * -(-parameters["samples"] // parameters["batch"])
    torch.set_num_threads(1)
    found = costs()
    serial, long = seconds(1, None, 0, 0, found), fitted_costs(found)
    costs_of = [seconds(RANKS, factor, *each["cycles"], found, long) for each in bias]
    last = serial if summary["serial"] else costs_of[-1]
    total = len(bias) * serial + sum(costs_of)
    ends = [each["batch"] for each in bias[1:]] + [batches + 1]
    for each, end, own, following in zip(bias, ends, costs_of, [*costs_of[1:], last]):
        total += (end - each["batch"]) * max(own, following)
        print(f"from batch {each['batch']}: {each['cycles']}, error {each['error']:.3f}, {serial / own:.2f}x")
    print(f"{batches} batches, {len(bias)} measurements: {batches * serial / total:.2f}x {summary['serial']}")
    return batches * serial / total


def curve(first: str, second: str) -> float:
    """Print the losses of two summaries, epoch by epoch; the largest relative difference."""
    runs = [[row["loss"] for row in json.loads(Path(name).read_text())["history"]] for name in (first, second)]
    for epoch, (a, b) in enumerate(zip(*runs), start=1):
        print(f"epoch {epoch:3d}: {a:.4f} {b:.4f}")
    worst = max(abs(a - b) / a for a, b in zip(*runs, strict=True))
    print(f"largest difference {100 * worst:.2f} %")
    return worst


def main(argv: Sequence[str] | None = None) -> None:
    """The model, a run by it, or a comparison of curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("model", "whole", "curve"))
    parser.add_argument("files", nargs="*", help="a summary, or two for curve")
    o = parser.parse_args(argv)
    {"model": model, "whole": whole, "curve": curve}[o.part](*o.files)


if __name__ == "__main__":
    main()
