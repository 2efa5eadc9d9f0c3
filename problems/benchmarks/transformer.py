"""A transformer of 32 blocks on four ranks: its loss curve by the default controller, and its time by the model.

python -m problems.benchmarks.transformer model           # seconds of a gradient, predicted from measured costs
python -m problems.benchmarks.transformer curve A B       # summaries of two runs of problems.transformer: their losses
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import nn_adapters as nna
from nn_adapters.layers import EncoderBlock
from pdeopt.steps.transfer import level_offsets, whole_intervals
from problems.benchmarks.fused import milliseconds
from problems.benchmarks.layer_model import LayerClocks, LayerCosts, schedule

LAYERS, RANKS = 32, 4

#: Coarsening factor, forward and adjoint cycles.
SETTINGS = [(factor, cycles, adjoint) for factor in (4, 8) for cycles, adjoint in ((0, 0), (1, 0), (1, 1))]


def costs(width: int = 64, heads: int = 4, hidden: int = 128, batch: int = 16, tokens: int = 32) -> LayerCosts:
    """Measured costs of a call of causal blocks and of a block in it: forward, and back by states alone."""
    found = {}
    for rows in (1, 8):
        network = nna.LayerParallel(None, lambda: EncoderBlock(width, heads, hidden, causal=True), rows, float(rows))
        level = network.step.linearize(list(network.stacks), (), lambda rows: 1.0)
        u, everything = torch.randn(rows, batch, tokens, width), slice(None)
        level.remember(u, everything)
        with torch.no_grad():
            forward = milliseconds(level.advance, u, everything)
        found[rows] = 1e-3 * forward, 1e-3 * milliseconds(level.pullback, u, everything)
    slopes = [(many - one) / 7 for one, many in zip(found[1], found[8])]
    ways = [(max(one - slope, 0.0), slope) for one, slope in zip(found[1], slopes)]
    return LayerCosts(*ways, width=width, batch=batch * tokens)


def model() -> None:
    """Print seconds of value and gradient on one rank in series, and on four by settings."""
    torch.set_num_threads(1)
    found = costs()
    serial = seconds(1, None, 0, 0, found)
    print(f"{LAYERS} blocks in series: {1e3 * serial:.0f} ms; on {RANKS} ranks, predicted:")
    for factor, cycles, adjoint in SETTINGS:
        own = seconds(RANKS, factor, cycles, adjoint, found)
        print(f"factor {factor}, cycles {cycles}/{adjoint}: {1e3 * own:.0f} ms, {serial / own:.2f}x", flush=True)


def seconds(ranks: int, factor: int | None, cycles: int, adjoint: int, found: LayerCosts) -> float:
    """Predicted, of value and gradient.

    The last run by the adjoint costs two of its layers, for the gradients of states and of weights. On coarse levels
    the adjoint begins with the states of its steps, a forward evaluation of each.
    """
    settings = nna.MgritSettings(1) if factor is None else nna.MgritSettings(2, str(factor))
    factors = settings.factors(LAYERS)
    levels = level_offsets(whole_intervals(LAYERS, factors, ranks), factors)
    forward = schedule(LayerClocks(ranks, found.forward, found.message), levels, factors, settings, cycles)
    back = schedule(LayerClocks(ranks, found.adjoint, found.message), levels, factors, settings, adjoint)
    own = int(np.diff(levels[0][0]).max())
    weights = (factors[0] if factors else own) * found.adjoint[0] + own * found.adjoint[1]
    again = 2 * int(np.diff(levels[1][0]).max()) * sum(found.forward) if factors else 0.0
    return float(forward.time.max() + back.time.max()) + weights + again


def curve(first: str, second: str) -> float:
    """Print the losses of two summaries, epoch by epoch; the largest relative difference."""
    runs = [[row["loss"] for row in json.loads(Path(name).read_text())["history"]] for name in (first, second)]
    for epoch, (a, b) in enumerate(zip(*runs), start=1):
        print(f"epoch {epoch:3d}: {a:.4f} {b:.4f}")
    worst = max(abs(a - b) / a for a, b in zip(*runs, strict=True))
    print(f"largest difference {100 * worst:.2f} %")
    return worst


def main(argv: Sequence[str] | None = None) -> None:
    """The model, or a comparison of curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("model", "curve"))
    parser.add_argument("files", nargs="*", help="two summaries, for curve")
    o = parser.parse_args(argv)
    if o.part == "model":
        model()
    else:
        curve(*o.files)


if __name__ == "__main__":
    main()
