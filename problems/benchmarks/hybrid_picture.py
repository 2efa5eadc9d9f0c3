"""The picture of `problems.benchmarks.hybrid -plot`: both cross-overs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from problems.benchmarks.hybrid_model import MODEL, Planner, Split, overtakes

#: Ranks of the left panel.
GROUP = 16
#: Samples there, in powers of two.
SAMPLES = range(3, 18)


def picture(file: str, planner: Planner, name: str, ranks: Sequence[int]) -> None:
    """Bytes of the data and the model split against the batch; seconds of a step against the ranks.

    Args:
        file: to write.
        planner, name: the network.
        ranks: of the right panel, powers of two.
    """
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    _volumes(left, planner)
    _seconds(right, planner, ranks)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    link = planner.rates.between
    network = f"{1e6 * link.latency:.2g} µs a message, {1e-9 * link.rate:.3g} GB/s"
    figure.suptitle(
        f"{name}: {planner.table.weights.sum() / 1e6:.3g} M weights; {network}; predicted", fontsize="medium"
    )
    figure.savefig(file, dpi=150)


def _volumes(axis: Axes, planner: Planner) -> None:
    """What the busiest rank of a few sends in a step."""
    curves: dict[str, list[tuple[int, float]]] = {"data": [], "model": []}
    for batch in (2**power for power in SAMPLES):
        here = replace(planner, batch=batch)
        steps = {"data": here.step(Split(data=GROUP)), "model": here.step(Split(group=GROUP, kind=MODEL))}
        for kind, step in steps.items():
            if step is not None:
                sent = step.traffic.inside.bytes + step.traffic.between.bytes + step.group_traffic.bytes
                curves[kind].append((batch, sent / 1e6))
    for kind, points in curves.items():
        if points:
            axis.loglog(*zip(*points), ".-", label=f"{kind} split")
    if all(curves.values()):
        (_, data), (batch, model) = curves["data"][-1], curves["model"][-1]
        axis.plot(batch * data / model, data, "o", fillstyle="none", markersize=11, color="0.3", label="as much")
    axis.set(title=f"sent by a rank of {GROUP} in a step", xlabel="samples of a step", ylabel="MB")


def _seconds(axis: Axes, planner: Planner, ranks: Sequence[int]) -> None:
    """A step by each split, and by the best."""
    found = {each: planner.pure(each) for each in ranks}
    for kind in ("data", "model", "domain", "pipeline", "layers"):
        points = [(each, steps[kind].seconds) for each, steps in found.items() if kind in steps]
        if len(points) > 1:
            axis.loglog(*zip(*points), ".-", label=f"{kind} alone")
    best = [(each, planner.best(each).seconds) for each in ranks]
    axis.loglog(*zip(*best), "-", color="0.2", linewidth=2.5, alpha=0.6, label="the best hybrid")
    if (crossed := overtakes(planner, ranks)) is not None:
        mark = crossed, planner.best(crossed).seconds
        axis.plot(*mark, "o", fillstyle="none", markersize=11, color="0.3", label="faster than data from here")
    axis.axvline(planner.batch, color="0.7", linestyle=":", label="one sample a rank")
    axis.set(
        title=f"a step of {planner.batch:,} samples", xlabel="ranks", ylabel="seconds", xlim=(0.8, 1.3 * ranks[-1])
    )
