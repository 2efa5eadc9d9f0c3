"""Which split of a network is best on 1 ... 65,536 ranks: data, model, domain, pipeline, layers in parallel, hybrids.

    python -m problems.benchmarks.hybrid -network alexnet -batch 2048 -plot build/hybrid.png
    python -m problems.benchmarks.hybrid -network mlp -rate 3e12 -call 2e-5 -node 8    # another machine
    python -m problems.benchmarks.hybrid -network odenet -depth 65536 -widths 8
    python -m problems.benchmarks.hybrid -network mlp -check              # against runs on this machine

Rates of layers are measured on one thread of this machine, or given; links are those of a cluster, or given, or
measured by `-links here`. See `hybrid_model` for what is counted. All figures for more ranks than this machine has are
predictions.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from nn_adapters.parallel.counts import direct_sum, rabenseifner_sum, ring_sum, two_level_sum
from problems.benchmarks.hybrid_kfac import kfac_more
from problems.benchmarks.hybrid_model import (
    KINDS,
    WIDTH,
    Link,
    Planner,
    Rates,
    Split,
    Step,
    crossover_batches,
    overtakes,
)
from problems.benchmarks.hybrid_networks import BATCHES, MODULES, LayerTable, named, table_of
from problems.benchmarks.hybrid_picture import picture
from problems.benchmarks.hybrid_work import step_of
from problems.benchmarks.processes import Row, median_seconds, plain, run, write

#: Median of the processor's seconds that a call takes.
cpu_seconds = partial(median_seconds, repeat=9, clock=time.process_time)

#: What a layer's rate is measured on: module, shape of a sample, few samples and many.
PROBES = {
    "dense": (lambda: nn.Linear(500, 500), (500,), 8, 512),
    "image": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 16, 16), 1, 8),
}


def measured_rates(inside: Link, between: Link, node: int) -> Rates:
    """Of layers and of the optimizer, on one thread of this machine."""
    torch.set_num_threads(1)
    speeds, calls = {}, []
    for kind, (make, shape, few, many) in PROBES.items():
        network = nn.Sequential(make(), nn.ReLU(), make(), nn.Flatten())
        table = table_of(network, shape)
        seconds = {samples: cpu_seconds(step_of(network, shape, samples)) for samples in (few, many)}
        slope = max(seconds[many] - seconds[few], 1e-9) / (many - few)
        speeds[kind] = float((table.passes * table.products).sum()) / slope
        calls.append(max(seconds[few] - few * slope, 1e-6) / len(table.names))
    weights = nn.Parameter(torch.randn(1_000_000))
    weights.grad = torch.randn(1_000_000)
    update = cpu_seconds(torch.optim.SGD([weights], 1e-3, momentum=0.9).step) / 1e6
    return Rates(speeds["dense"], speeds["image"], min(calls), update, node, inside, between)


def rows_of(planner: Planner, name: str, ranks: list[int]) -> list[Row]:
    """The plan as a table."""
    case, table, one = f"{name}, batch {planner.batch}", planner.table, planner.best(1)
    rows = [plain(f"{case}, one rank", one.seconds, "s a step")]
    crossings = crossover_batches(table)
    if len(crossings) <= 20:
        for layer, kind, batch in zip(table.names, np.where(table.is_image, "convolution", "dense"), crossings):
            rows.append(plain(f"{name}, layer {layer} ({kind}): model sends less than data below", batch, "samples"))
    for each in ranks:
        best, alone = planner.best(each), planner.pure(each)
        kinds = "" if best.split.group == 1 else " of " + _kinds(best)
        note = f"{best.split}{kinds}, {best.memory / 1e6:.3g} MB a rank"
        rows.append(plain(f"{case}, {each} ranks: {note}", one.seconds / best.seconds, "x one rank"))
        if each > 1:
            shown = [
                plain(f"    {kind} alone", one.seconds / step.seconds, "x one rank") for kind, step in alone.items()
            ]
            rows += shown
    found = overtakes(planner, ranks)
    rows.append(plain(f"{case}: a hybrid is faster than data alone from", found or float("inf"), "ranks"))
    return [*rows, *sums_of(planner, ranks), *kfac_of(planner, ranks)]


def sums_of(planner: Planner, ranks: list[int]) -> list[Row]:
    """A sum of the gradients over all ranks by each way that there is."""
    size, rates, rows = WIDTH * float(planner.table.weights.sum()), planner.rates, []
    for each in ranks[5::5]:
        inside = min(rates.node, each)
        ways = {
            "all to all": rates.link(each).seconds(direct_sum(size, each)),
            "ring": rates.link(each).seconds(ring_sum(size, each)),
            "Rabenseifner": rates.link(each).seconds(rabenseifner_sum(size, each)),
            f"two levels, {inside} ranks a node": rates.seconds(two_level_sum(size, inside, each // inside)),
        }
        rows += [
            plain(f"a sum of gradients over {each} ranks, {way}", 1e3 * found, "ms") for way, found in ways.items()
        ]
    return rows


def kfac_of(planner: Planner, ranks: list[int]) -> list[Row]:
    """What K-FAC adds to the data split."""
    rows = []
    for each in ranks[1::4]:
        if (data := planner.step(Split(data=each))) is not None:
            more = kfac_more(planner, each)
            note = f"{more.sent / 1e6:.3g} MB more to send, {more.held / 1e6:.3g} MB to hold"
            rows.append(
                plain(f"K-FAC on {each} ranks: {note}, seconds more", more.seconds / data.seconds, "steps of SGD")
            )
    return rows


def _kinds(step: Step) -> str:
    """As `5 domain, 3 model`."""
    counts = [(int((step.kinds == place).sum()), kind) for place, kind in enumerate(KINDS)]
    return ", ".join(f"{count} {kind}" for count, kind in counts if count)


def check(name: str, table: LayerTable, rates: Rates) -> list[Row]:
    """Predicted against measured on this machine: work of batches that were no probes, bytes, a step of two ranks."""
    make, shape = MODULES[name]
    network, rows = make(), []
    for samples in (16, 64, 256):
        step = Planner(table, samples, rates).step(Split())
        assert step is not None
        measured = cpu_seconds(step_of(network, shape, samples), repeat=5)
        update = float(table.weights.sum()) * rates.update
        case = f"{name}, {samples} samples on one rank ({1e3 * measured:.3g} ms of the processor): predicted / measured"
        rows.append(plain(case, (step.compute - update) / measured, "x"))
    here = run("problems.benchmarks.hybrid_work", "link", ranks=2)
    local = replace(rates, node=2, inside=Link(here["latency"], here["rate"]))
    one, two = (run("problems.benchmarks.hybrid_work", "data", name, 256, ranks=ranks) for ranks in (1, 2))
    predicted = Planner(table, 256, local).step(Split(data=2))
    assert predicted is not None
    rows.append(
        plain(
            f"{name}: bytes that a rank of two sends, predicted / counted",
            predicted.traffic.inside.bytes / two["sent"],
            "x",
        )
    )
    rows.append(
        plain(
            f"{name}: a step of 256 samples on two ranks, predicted / measured (wall)",
            predicted.seconds / two["seconds"],
            "x",
        )
    )
    rows.append(plain(f"{name}: two ranks against one, measured (wall)", one["seconds"] / two["seconds"], "x"))
    rows.append(plain("a message here", 1e6 * here["latency"], "us"))
    return [*rows, plain("a link here", 1e-9 * here["rate"], "GB/s")]


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("-network", choices=tuple(BATCHES), default="alexnet", help="the network")
    found.add_argument("-widths", type=int, nargs="+", default=[], help="of mlp, as 784 500 500 10; the one of odenet")
    found.add_argument("-depth", type=int, default=4096, help="layers of odenet")
    found.add_argument("-batch", type=int, default=0, help="samples of a step; by default the network's")
    found.add_argument("-ranks", type=int, default=65_536, help="at most, a power of two")
    found.add_argument("-rate", type=float, default=0.0, help="multiplications a second of a rank; 0: measured here")
    found.add_argument("-call", type=float, default=2e-5, help="seconds of a layer beside them (with -rate)")
    found.add_argument("-update", type=float, default=1e-11, help="seconds of a weight's update (with -rate)")
    found.add_argument("-links", choices=("given", "here"), default="given", help="what messages cost")
    found.add_argument("-latency", type=float, default=2e-6, help="seconds of a message between nodes")
    found.add_argument("-bandwidth", type=float, default=1e10, help="bytes a second between nodes")
    found.add_argument("-node", type=int, default=1, help="ranks of a node, a power of two")
    found.add_argument("-node_latency", type=float, default=5e-7, help="seconds of a message inside a node")
    found.add_argument("-node_bandwidth", type=float, default=2e10, help="bytes a second inside a node")
    found.add_argument("-no_overlap", action="store_true", help="sums of gradients wait for the backward pass")
    found.add_argument("-check", action="store_true", help="compare with runs on this machine")
    found.add_argument("-json", default="", help="write the rows to this file")
    found.add_argument("-plot", default="", help="write a picture to this file")
    return found


def refuse(options: argparse.Namespace, fail: Any) -> None:
    """End with a message where options are not legal."""
    for name in ("ranks", "node"):
        if (value := getattr(options, name)) < 1 or value & (value - 1):
            fail(f"-{name}: got {value}; legal: a power of two")
    positive = ("call", "update", "latency", "bandwidth", "node_latency", "node_bandwidth", "depth", *["widths"])
    for name in positive:
        values = getattr(options, name)
        if not all(value > 0 for value in (values if isinstance(values, list) else [values])):
            fail(f"-{name}: got {values}; legal: numbers > 0")
    if options.batch < 0 or options.rate < 0:
        fail("-batch, -rate: legal: numbers >= 0")
    if options.network in ("cnn", "alexnet") and options.widths:
        fail("-widths: belongs to mlp and odenet")
    if options.network == "mlp" and len(options.widths) == 1:
        fail("-widths: got one number; legal: two or more, as 784 500 500 10")
    if options.network == "odenet" and len(options.widths) > 1:
        fail("-widths: got several numbers; legal: one, the width of all layers")
    if options.check and options.network not in ("mlp", "cnn"):
        fail("-check: legal: with mlp and cnn, which fit here")


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure or take rates, plan, print the table; write it and the picture where asked to."""
    reader = parser()
    options = reader.parse_args(argv)
    refuse(options, reader.error)
    inside, between = Link(options.node_latency, options.node_bandwidth), Link(options.latency, options.bandwidth)
    if options.links == "here":
        here = run("problems.benchmarks.hybrid_work", "link", ranks=2)
        inside = between = Link(here["latency"], here["rate"])
    if options.rate:
        rates = Rates(options.rate, options.rate, options.call, options.update, options.node, inside, between)
    else:
        rates = measured_rates(inside, between, options.node)
    table = named(options.network, tuple(options.widths), options.depth)
    planner = Planner(table, options.batch or BATCHES[options.network], rates, not options.no_overlap)
    rows = [
        plain("multiplications of dense layers", 1e-9 * rates.dense, "G/s"),
        plain("multiplications of convolutions", 1e-9 * rates.image, "G/s"),
        plain("a layer in a step, beside them", 1e6 * rates.call, "us"),
        plain("the update of a weight", 1e9 * rates.update, "ns"),
    ]
    ranks = [2**power for power in range(options.ranks.bit_length())]
    rows += rows_of(planner, options.network, ranks)
    if options.check:
        rows += check(options.network, table, rates)
    write(options.json, rows)
    if options.plot:
        picture(options.plot, planner, options.network, ranks)
    return rows


if __name__ == "__main__":
    main()
