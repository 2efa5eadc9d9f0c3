"""Layer-parallel networks on many ranks, predicted: measured costs of batched layers, counted calls and messages.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.layer_model -json build/layer_model.json -plot build/layer_model.png

A clock for each rank runs through the cycles of `pdeopt.steps.mgrit`: intervals at once, the coarsest level from rank
to rank, coarse levels on the ranks that have intervals of them. `tests/problems/test_layer_model.py` compares its calls
and messages with those of real runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nn_adapters.layers.blocks import dense
from nn_adapters.layers.layerparallel import LayerParallel
from pdeopt.steps.mgrit import MgritSettings
from pdeopt.steps.transfer import level_offsets, whole_intervals
from problems.benchmarks.processes import Row, bar, median_seconds, plain, write

WIDTH, BATCH = 8, 500


@dataclass(frozen=True)
class LayerCosts:
    """Seconds of a call and of a layer in it, forward and adjoint; of a message without content; bytes a second.

    Beside them the features of a sample, and the samples.
    """

    forward: tuple[float, float]
    adjoint: tuple[float, float]
    latency: float = 2e-6
    bandwidth: float = 1e10
    width: int = WIDTH
    batch: int = BATCH

    @property
    def bytes(self) -> int:
        """Of the features of one layer."""
        return 4 * self.width * self.batch

    @property
    def message(self) -> float:
        """Features of one layer, from a rank to the next."""
        return self.latency + self.bytes / self.bandwidth


@dataclass
class LayerClocks:
    """The clock of each rank; calls of the propagator, layers in them, and messages, by rank."""

    ranks: int
    call: tuple[float, float]
    message: float
    time: np.ndarray = field(init=False)
    calls: np.ndarray = field(init=False)
    layers: np.ndarray = field(init=False)
    messages: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.time = np.zeros(self.ranks)
        self.calls, self.layers, self.messages = np.zeros((3, self.ranks), dtype=int)

    def work(self, rows: np.ndarray, calls: int | np.ndarray = 1, stages: float = 1) -> None:
        """Calls of the propagator with so many layers of each rank altogether; long steps have two stages."""
        calls = np.where(rows > 0, calls, 0)
        self.time += stages * (calls * self.call[0] + rows * self.call[1])
        self.calls += calls
        self.layers += rows

    def shift(self, rows: np.ndarray) -> None:
        """The last C-point of a rank to the next that has rows."""
        ranks = np.flatnonzero(rows)
        self.time[ranks[1:]] = np.maximum(self.time[ranks[1:]], self.time[ranks[:-1]] + self.message)
        self.messages[ranks[:-1]] += 1

    def march(self, steps: np.ndarray, stages: float = 1) -> None:
        """One step after the other, from rank to rank."""
        own, ready = stages * steps * (self.call[0] + self.call[1]), -np.inf
        ranks = np.flatnonzero(steps)
        for rank in ranks:
            self.time[rank] = max(self.time[rank], ready) + own[rank]
            ready = self.time[rank] + self.message
        self.messages[ranks[:-1]] += 1
        self.calls += steps
        self.layers += steps

    def move(self, source: np.ndarray, target: np.ndarray, tensors: int) -> None:
        """Rows of so many tensors from the ranks of one distribution to those of another, see `Move`."""
        if np.array_equal(source, target):
            return
        begin = np.unique(np.concatenate([source, target]))
        first, rows = begin[:-1], np.diff(begin)
        giver, taker = (np.searchsorted(offsets, first, side="right") - 1 for offsets in (source, target))
        away = giver != taker
        arrives = self.time[giver] + tensors * rows * self.message
        np.maximum.at(self.time, taker[away], arrives[away])
        np.add.at(self.messages, giver[away], 1)


#: Who has which steps of each level, see `level_offsets`.
Levels = list[tuple[np.ndarray, np.ndarray]]


def schedule(
    clocks: LayerClocks,
    levels: Levels,
    factors: Sequence[int],
    settings: MgritSettings,
    cycles: int,
    at_once: int = 1_000_000,
    stages: float = 2,
) -> LayerClocks:
    """`Mgrit.solve` in one direction. All factors divide, a nested start; evaluations in a coarse step are `stages`."""
    last, steps = len(factors), [np.diff(own) for _, own in levels]

    def travel(level: int) -> None:
        clocks.shift(steps[level])
        intervals = np.ceil(steps[level] / factors[level])
        parts = np.ceil(intervals / at_once).astype(int)  # in which they go through
        clocks.work(steps[level], factors[level] * parts, stages if level else 1)

    def nested(level: int) -> None:
        if level == last:
            clocks.march(steps[last], stages)
        else:
            nested(level + 1)
            travel(level)
        clocks.move(*levels[level][::-1], 1)

    def cycle(level: int, kind: str) -> None:
        for _ in range(1 + settings.relaxation.count("C")):
            travel(level)
        clocks.move(*levels[level + 1], 3)
        clocks.work(steps[level + 1], stages=stages)
        if level + 1 == last:
            clocks.march(steps[last], stages)
        else:
            for again in ("F", "V") if kind == "F" else ("V",):
                cycle(level + 1, again)
            travel(level + 1)
        clocks.move(*levels[level + 1][::-1], 1)

    if last == 0:
        clocks.march(steps[0])
        return clocks
    nested(1)
    for _ in range(cycles):
        cycle(0, settings.cycle)
    travel(0)
    return clocks


def predict(layers: int, ranks: int, settings: MgritSettings, costs: LayerCosts) -> float:
    """Seconds of forward and gradient."""
    factors = settings.factors(layers)
    levels = level_offsets(whole_intervals(layers, factors, ranks), factors)
    at_once = max(1, 1024 * settings.cache // costs.bytes)
    ways = ((costs.forward, settings.cycles), (costs.adjoint, settings.adjoint_cycles))
    return sum(
        float(schedule(LayerClocks(ranks, call, costs.message), levels, factors, settings, cycles, at_once).time.max())
        for call, cycles in ways
    )


def measure_costs(width: int = WIDTH, batch: int = BATCH, repeat: int = 300) -> LayerCosts:
    """Costs of a call and of a layer in it, from calls with few and with many layers on this machine."""
    torch.set_num_threads(1)
    found, costs = {rows: _calls(rows, width, batch, repeat) for rows in (1, 64)}, {}
    for name in ("forward", "adjoint"):
        slope = (found[64][name] - found[1][name]) / 63
        costs[name] = (max(found[1][name] - slope, 0.0), slope)
    return LayerCosts(costs["forward"], costs["adjoint"], width=width, batch=batch)


@torch.no_grad()
def _calls(rows: int, width: int, batch: int, repeat: int) -> dict[str, float]:
    """Seconds of a call with so many layers."""
    network = LayerParallel(None, lambda: dense(width, "relu"), rows)
    level = network.step.linearize(list(network.stacks), (), lambda rows: 1.0)
    u, everything = torch.randn(rows, width, batch), slice(None)
    level.remember(u, everything)
    return {
        "forward": median_seconds(lambda: level.advance(u, everything), repeat),
        "adjoint": median_seconds(lambda: level.pullback(u, everything), repeat),
    }


def main(argv: list[str] | None = None) -> list[Row]:
    """Predict strong and weak scaling, print, write and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-plot", default="", help="write a picture to this file")
    parser.add_argument("-layers", type=int, default=65_536, help="of the strong scaling, a power of two")
    options = parser.parse_args(argv)
    costs = measure_costs()
    rows = [
        plain(f"a call {way}, of which a layer {1e6 * call[1]:.2f} us", 1e6 * sum(call), "us")
        for way, call in (("forward", costs.forward), ("adjoint", costs.adjoint))
    ]
    kinds = {
        "2 levels, factor 16": MgritSettings(2, "16", adjoint_cycles=1),
        "3 levels, factors 16, 4": MgritSettings(3, "16,4", adjoint_cycles=1),
        "6 levels, factors 16, 4": MgritSettings(6, "16,4", adjoint_cycles=1),
        "7 levels, factor 4": MgritSettings(7, "4", adjoint_cycles=1),
    }
    serial = predict(options.layers, 1, MgritSettings(1), costs)
    rows.append(plain(f"{options.layers} layers, serial", serial, "s"))
    strong: dict[str, list[tuple[int, float]]] = {}
    for name, settings in kinds.items():
        most = min(options.layers // settings.factors(options.layers)[0], 4096)
        strong[name] = [(2**k, predict(options.layers, 2**k, settings, costs)) for k in range(int(np.log2(most)) + 1)]
        for ranks, seconds in strong[name]:
            rows.append(plain(f"{options.layers} layers, {name}, {ranks} ranks", serial / seconds, "x serial"))
        crossover = next((ranks for ranks, seconds in strong[name] if seconds < serial), None)
        rows.append(plain(f"{options.layers} layers, {name}: faster than serial from", crossover or np.inf, "ranks"))
    rows.append(_gain(options.layers, 1024, costs))
    rows += full_space(costs)
    weak = [
        (int(p), predict(1024 * int(p), int(p), MgritSettings(20, "16,4", adjoint_cycles=1), costs))
        for p in 4 ** np.arange(7)
    ]
    rows += [
        plain(f"1024 layers a rank, factors 16, 4, 4, ..., {ranks} ranks", seconds, "s") for ranks, seconds in weak
    ]
    write(options.json, rows)
    if options.plot:
        _plot(options.plot, options.layers, serial, strong, weak)
    return rows


def _gain(layers: int, ranks: int, costs: LayerCosts) -> Row:
    """What coarse levels on fewer ranks gain over the best hierarchy of which each rank has whole intervals."""
    share = layers // ranks  # factors of two whose product is at most that of a rank
    words = ["64", "16", "16,4", "32,2", "8,8", "4,4,4", "2,2,2,2,2,2"]
    fit = [word for word in words if int(np.prod([int(factor) for factor in word.split(",")])) <= share]
    whole = [MgritSettings(2 + word.count(","), word, adjoint_cycles=1) for word in fit]
    deep = [MgritSettings(levels, "16,4", adjoint_cycles=1) for levels in range(4, 10)]
    best = [min(predict(layers, ranks, each, costs) for each in kinds) for kinds in (whole, deep)]
    case = f"{layers} layers, {ranks} ranks: coarse levels on fewer ranks"
    return bar(case, best[0] / best[1], "x", 2.0, at_most=False)


#: Sweeps of a Gauss-Newton step: states, adjoint, and two for each of five products; and cycles of one, as
#: `network_sqp -only one_shot` counts them: until it is exact (2,390 in 456 sweeps), and in one shot.
SWEEPS, EXACT_CYCLES, SHOT_CYCLES = 12, 5, 2


def full_space(costs: LayerCosts) -> list[Row]:
    """What Gauss-Newton steps with sweeps by MGRIT gain over the reduced path, whose sweeps wait for each layer."""
    ways = {"full space, exact sweeps": EXACT_CYCLES, "one shot": SHOT_CYCLES}
    rows = []
    for layers in (1024, 65_536):
        reduced = SWEEPS / 2 * predict(layers, 1, MgritSettings(1), costs)
        rows.append(plain(f"Gauss-Newton step, {layers} layers, reduced path", reduced, "s"))
        for ranks in (4, 16, 64, 256, 1024):
            for name, cycles in ways.items():
                seconds = SWEEPS / 2 * _fastest(layers, ranks, cycles, costs)
                if seconds < float("inf"):
                    case = f"Gauss-Newton step, {layers} layers, {ranks} ranks, {name}"
                    rows.append(plain(case, reduced / seconds, "x the reduced path"))
    return rows


def _fastest(layers: int, ranks: int, cycles: int, costs: LayerCosts) -> float:
    """Seconds of a sweep forward and one back by the best hierarchy for so many ranks; infinite where none fits."""
    kinds = [MgritSettings(n, word, cycles, cycles) for n in range(2, 8) for word in ("4", "16", "64", "16,4")]
    possible = [kind for kind in kinds if -(-layers // kind.factors(layers)[0]) >= ranks]
    return min((predict(layers, ranks, kind, costs) for kind in possible), default=float("inf"))


def _plot(
    file: str, layers: int, serial: float, strong: dict[str, list[tuple[int, float]]], weak: list[tuple[int, float]]
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(serial, color="0.3", linestyle="--", label="one layer after the other")
    for name, points in strong.items():
        line = left.loglog(*zip(*points), ".-", label=name)[0]
        crossed = [point for point in points if point[1] < serial][:1]
        left.plot(*zip(*crossed), "o", fillstyle="none", markersize=11, color=line.get_color())
    left.set(title=f"{layers:,} layers; ring: faster than serial from here", xlabel="ranks", ylabel="predicted seconds")
    left.legend(fontsize="small")
    right.semilogx(*zip(*weak), ".-")
    right.set(title="1024 layers a rank, factors 16, 4, 4, ...", xlabel="ranks", ylim=(0, None))
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
