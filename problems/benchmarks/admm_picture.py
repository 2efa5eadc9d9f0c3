"""The picture of `problems.benchmarks.admm -plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from problems.benchmarks.admm_model import Prediction


def picture(
    file: str,
    model: Prediction,
    samples: int,
    ranks: Sequence[int],
    published: Mapping[int, float],
    measured: Mapping[int, float],
) -> None:
    """Speed-up against ranks, and what an iteration takes.

    Args:
        file: to write.
        model, samples, ranks: what is predicted.
        published, measured: seconds of runs.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = [model.iteration(samples, each) for each in ranks]
    everywhere = [model.iteration(samples, each, published=True).seconds for each in ranks]
    left.loglog(ranks, ranks, ":", color="0.6", label="ideal")
    left.loglog(ranks, [found[0].seconds / each.seconds for each in found], ".-", label="here, predicted")
    left.loglog(ranks, [everywhere[0] / each for each in everywhere], ".--", label="the same, inverses on every rank")
    left.loglog(
        list(published), [published[1] / each for each in published.values()], "s-", ms=4, label="published run"
    )
    left.loglog(list(measured), [measured[1] / each for each in measured.values()], "k*", ms=9, label="measured")
    left.set(title=f"speed-up, {samples:,} samples in every iteration", xlabel="ranks", ylim=(0.8, 2 * ranks[-1]))
    for name, label in (("local", "work on samples"), ("solves", "factors and solves"), ("messages", "messages")):
        right.loglog(ranks, [getattr(each, name) for each in found], ".-", label=label, nonpositive="mask")
    right.loglog(ranks, [each.seconds for each in found], color="0.3", label="an iteration")
    costs = model.costs
    network = f"{1e6 * costs.latency:g} µs a message, {1e-9 * costs.bandwidth:g} GB/s"
    right.set(title=f"predicted seconds; {network}", xlabel="ranks", ylim=(1e-5, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)
