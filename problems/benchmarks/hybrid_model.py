"""A step of training on many ranks by each split of a network, predicted from rates and counted messages.

Ranks are a box, data x stages x group: `data` parts of the batch, `stages` of layers one after the other, and `group`
ranks that share each layer. Within a group each layer is split as is best for it:

- model: rows of its weight. Outputs are gathered, b d_i (g-1)/g numbers in log2 g messages; derivatives by its inputs
  are summed, 2 b d_{i-1} (g-1)/g in 2 log2 g;
- domain: slabs of its image. Halos of k - stride rows come from two neighbors, and go back to them; its weights are
  summed over the group, too;
- alike: every rank of the group does all of it.

Source: A. Gholami, A. Azad, P. Jin, K. Keutzer, A. Buluc, Integrated model, batch, and domain parallelism in training
neural networks, SPAA 2018. Gradients are summed over `data` by rings inside a node and Rabenseifner's halves between
nodes, 2 w (N-1)/N bytes in 2 log2 N messages (`nn_adapters.parallel.counts`), behind the backward pass. A pipeline of p
stages and m micro-batches takes m + p - 1 turns: a share (p-1)/m of the work is idle (Y. Huang and others, GPipe,
NeurIPS 2019). Layers of residual networks are solved in parallel as `layer_model` predicts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from nn_adapters.parallel.counts import Count, Traffic, two_level_sum
from pdeopt.steps.mgrit import MgritSettings
from problems.benchmarks.hybrid_networks import LayerTable
from problems.benchmarks.layer_model import LayerCosts, predict

#: Bytes of a number; copies of a weight: itself, gradient, momentum.
WIDTH, COPIES = 4, 3
#: Share of a step's work that goes backward; of three passes the first layer needs no derivative by its inputs.
BACKWARD = 2 / 3

#: How a layer is split in its group.
KINDS = "model", "domain", "alike"
MODEL, DOMAIN, ALIKE = range(3)


@dataclass(frozen=True)
class Link:
    """Between two ranks: seconds of a message without content, and bytes a second."""

    latency: float
    rate: float

    def seconds(self, count: Count) -> float:
        """Of messages one after the other."""
        return count.seconds(self.latency, self.rate)


@dataclass(frozen=True)
class Rates:
    """Of a machine.

    Attributes:
        dense, image: multiplications a second in dense layers and convolutions, with many samples.
        call: seconds of a layer in a step beside them, forward and backward.
        update: seconds of an optimizer's step for one weight.
        node: ranks of a node.
        inside, between: links of ranks of a node, and of those of others.
    """

    dense: float
    image: float
    call: float
    update: float
    node: int = 1
    inside: Link = field(default_factory=lambda: Link(5e-7, 2e10))
    between: Link = field(default_factory=lambda: Link(2e-6, 1e10))

    def link(self, ranks: int) -> Link:
        """Of neighbors among so many ranks in a row."""
        return self.inside if ranks <= self.node else self.between

    def seconds(self, traffic: Traffic) -> float:
        """Of messages inside nodes, then between them."""
        return self.inside.seconds(traffic.inside) + self.between.seconds(traffic.between)


@dataclass(frozen=True)
class Split:
    """A box of ranks.

    Attributes:
        data: parts of the batch.
        group: ranks that share each layer.
        stages: of a pipeline of layers.
        layers: ranks that solve through the layers in parallel (`LayerParallel`); 0: one layer after the other.
        micro: batches that a rank's samples go through the stages in.
        kind: of the layers in a group, where it is not the best for each.
    """

    data: int = 1
    group: int = 1
    stages: int = 1
    layers: int = 0
    micro: int = 1
    kind: int | None = None

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.data * self.group * self.stages * max(1, self.layers)

    def __str__(self) -> str:
        group = "group" if self.kind is None else KINDS[self.kind]
        names = {"data": "data", "group": group, "stages": "stages", "layers": "layers in parallel"}
        parts = [f"{each} {name}" for key, name in names.items() if (each := getattr(self, key)) > (key != "layers")]
        more = f" ({self.micro} micro-batches)" if self.stages > 1 else ""
        return " x ".join(parts or ["one rank"]) + more


@dataclass(frozen=True)
class Step:
    """A step of training by one split, on the busiest rank.

    Attributes:
        split: it.
        compute: seconds of layers and of the optimizer.
        within: seconds of messages in a group and between stages, and of stages that wait.
        sums: seconds of sums of gradients.
        hidden: of these, behind the backward pass.
        traffic: bytes and messages of the sums of gradients.
        group_traffic: of those in a group.
        stage_traffic: of those between stages.
        memory: bytes: weights, gradients, momentum, features.
        kinds: of each layer in its group, places in `KINDS`.
    """

    split: Split
    compute: float
    within: float
    sums: float
    hidden: float
    traffic: Traffic
    group_traffic: Count
    stage_traffic: Count
    memory: float
    kinds: np.ndarray

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.within + self.sums - self.hidden


@dataclass(frozen=True)
class Planner:
    """Steps of one network with one batch.

    Args:
        table: the network.
        batch: samples of a step, of all ranks.
        rates: of the machine.
        overlap: whether sums of gradients travel behind the backward pass.
    """

    table: LayerTable
    batch: int
    rates: Rates
    overlap: bool = True
    _known: dict[int, Step | None] = field(default_factory=dict, init=False, compare=False, repr=False)

    def step(self, split: Split) -> Step | None:
        """What a split takes; None where it is impossible: no sample for some part, no layer for some stage."""
        table, samples = self.table, self.batch / split.data
        if samples < max(1, split.micro) or split.stages > len(table.names):
            return None
        if split.layers:
            return self._in_parallel(split, samples) if table.is_residual and split.group * split.stages == 1 else None
        kinds = self.kinds(split, samples / split.micro)
        if split.group > 1 and (kinds == ALIKE).all():
            return None
        work, counts = self._layers(kinds, split.group, samples / split.micro)
        link = self.rates.link(split.group)
        talk = counts[0] * link.latency + counts[1] / link.rate
        first = stage_starts(work + talk, split.stages)
        turns = np.add.reduceat(work + talk, first)
        busiest = int(turns.argmax())
        crossing = self._crossing(split, samples, first)
        turn = float(turns.max()) + self.rates.link(split.group * split.stages).seconds(crossing) / split.micro
        own_work = split.micro * float(np.add.reduceat(work, first)[busiest])
        traffic, kept = self._sums(kinds, split, first)
        update = kept * self.rates.update
        sums = self.rates.seconds(traffic)
        hidden = min(sums, own_work * BACKWARD) if self.overlap else 0.0
        within = (split.micro + split.stages - 1) * turn - own_work
        sent = Count(*(split.micro * float(np.add.reduceat(each, first)[busiest]) for each in counts))
        memory = WIDTH * (COPIES * kept + self._features(kinds, split, samples, first))
        return Step(split, own_work + update, within, sums, hidden, traffic, sent, crossing, memory, kinds)

    def kinds(self, split: Split, samples: float) -> np.ndarray:
        """How each layer is split in its group: what takes least, of what its rows and outputs allow."""
        table, g = self.table, split.group
        if g == 1:
            return np.full(len(table.names), ALIKE)
        link, seconds = self.rates.link(g), []
        allowed = {MODEL: table.sides[:, 0] >= g, DOMAIN: table.is_image & (table.rows >= g), ALIKE: True}
        for kind, places in allowed.items():
            work, (messages, sent) = self._layers(np.full(len(table.names), kind), g, samples)
            is_legal = places & (split.kind in (None, kind) or kind == ALIKE)
            seconds.append(np.where(is_legal, work + messages * link.latency + sent / link.rate, np.inf))
        return np.argmin(seconds, axis=0)

    def _layers(self, kinds: np.ndarray, g: int, samples: float) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Seconds of work of each layer in a turn; messages one after the other, and bytes, in its group."""
        table = self.table
        share = np.where(kinds == ALIKE, 1.0, 1.0 / g)
        speed = np.where(table.is_image, self.rates.image, self.rates.dense)
        work = self.rates.call + table.passes * table.products * samples * share / speed
        levels, part, inner = math.log2(g), (g - 1) / g, np.arange(len(table.names)) > 0
        neighbors = min(2, g - 1)
        model, domain = kinds == MODEL, kinds == DOMAIN
        before = np.concatenate([domain[:1], domain[:-1]])  # the samples are where they are wanted
        joined = (before & (kinds == ALIKE)) | (domain & ~before)  # slabs forward, or derivatives of them backward
        messages = model * (1 + 2 * inner) * levels + domain * neighbors * (1 + inner) + joined * levels
        numbers = model * (table.outputs + 2 * inner * table.inputs) + joined * table.inputs
        numbers = numbers * part + domain * neighbors / 2 * (1 + inner) * table.halo
        return work, (messages, WIDTH * samples * numbers)

    def _sums(self, kinds: np.ndarray, split: Split, first: np.ndarray) -> tuple[Traffic, float]:
        """Of the gradients of a stage: those of slabs over the group, too. And the weights that a rank has."""
        g = split.group
        own = self.table.weights * np.where(kinds == MODEL, 1.0 / g, 1.0)
        alone = np.add.reduceat(np.where(kinds == DOMAIN, 0.0, own), first)
        shared = np.add.reduceat(np.where(kinds == DOMAIN, own, 0.0), first)
        most = int((alone + shared).argmax())
        inside = max(1, self.rates.node // (g * split.stages))
        traffic = _sum(WIDTH * alone[most], split.data, inside)
        traffic = traffic + _sum(WIDTH * shared[most], split.data * g, min(self.rates.node, g * inside))
        return traffic, float((alone + shared)[most])

    def _features(self, kinds: np.ndarray, split: Split, samples: float, first: np.ndarray) -> float:
        """Numbers of features that the backward pass needs, of the stage with most of them."""
        share = np.where(kinds == DOMAIN, 1.0 / split.group, 1.0)
        return samples * float(np.add.reduceat(share * self.table.outputs, first).max())

    def _crossing(self, split: Split, samples: float, first: np.ndarray) -> Count:
        """What the busiest stage sends: features to the next one, derivatives to the one before."""
        if split.stages == 1:
            return Count()
        cuts = np.concatenate([[0.0], self.table.inputs[first[1:]], [0.0]])
        return Count(split.micro * min(2, split.stages - 1), WIDTH * samples * float((cuts[1:] + cuts[:-1]).max()))

    def _in_parallel(self, split: Split, samples: float) -> Step | None:
        """Layers solved in parallel by multigrid, with inexact gradients; a part of the batch for each group."""
        layer = float(self.table.products[0]), float(self.table.outputs[0])
        found = _through_layers(self.rates, *layer, samples, len(self.table.names), split.layers)
        if found is None:
            return None
        kept = float(self.table.weights.sum()) / split.layers
        traffic = _sum(WIDTH * kept, split.data, max(1, self.rates.node // split.layers))
        sums = self.rates.seconds(traffic)
        hidden = min(sums, found * BACKWARD) if self.overlap else 0.0
        memory = WIDTH * (COPIES * kept + samples * float(self.table.outputs.sum()) / split.layers)
        kinds = np.full(len(self.table.names), ALIKE)
        return Step(
            split, found + kept * self.rates.update, 0.0, sums, hidden, traffic, Count(), Count(), memory, kinds
        )

    # -- choices -----------------------------------------------------------------------------------------------

    def pure(self, ranks: int) -> dict[str, Step]:
        """The splits of one kind alone that are possible on so many ranks."""
        splits = {
            "data": [Split(data=ranks)],
            "model": [Split(group=ranks, kind=MODEL)],
            "domain": [Split(group=ranks, kind=DOMAIN)],
            "pipeline": [Split(stages=ranks, micro=m) for m in self._micros(ranks, 1)],
            "layers": [Split(layers=ranks)] if self.table.is_residual else [],
        }
        found = {name: self._best(each) for name, each in splits.items()}
        return {name: step for name, step in found.items() if step is not None}

    def best(self, ranks: int) -> Step:
        """The fastest of all boxes of so many ranks, or fewer where more do not help. Powers of two."""
        for power in range(ranks.bit_length()):
            if power not in self._known:
                self._known[power] = self._best(self._boxes(power))
        steps = [step for power in range(ranks.bit_length()) if (step := self._known[power]) is not None]
        return min(steps, key=lambda step: step.seconds)

    def _boxes(self, power: int) -> Iterator[Split]:
        """All of 2^power ranks."""
        for data in range(power + 1):
            for group in range(power - data + 1):
                stages = 2 ** (power - data - group)
                for micro in self._micros(stages, 2**data):
                    yield Split(2**data, 2**group, stages, micro=micro)
            if self.table.is_residual:
                yield Split(2**data, layers=2 ** (power - data))

    def _micros(self, stages: int, data: int) -> list[int]:
        if stages == 1:
            return [1]
        return [m for k in range(-1, 4) if 1 <= (m := int(stages * 2.0**k)) <= self.batch // data]

    def _best(self, splits: Any) -> Step | None:
        steps = [step for split in splits if (step := self.step(split)) is not None]
        return min(steps, key=lambda step: (step.seconds, step.split.ranks), default=None)


def _sum(size: float, ranks: int, inside: int) -> Traffic:
    """A sum in two levels over ranks of which so many, at most, are in a node."""
    inside = min(inside, ranks)
    return two_level_sum(size, inside, ranks // inside) if ranks > 1 and size else Traffic()


def stage_starts(work: np.ndarray, stages: int) -> np.ndarray:
    """Where each stage of a pipeline begins: layers in a row, at least one each, with about equal work.

    Args:
        work: of each layer, >= 0.
        stages: at most as many as layers.
    """
    before = np.concatenate([[0.0], work.cumsum()[:-1]]) + 0.5 * work
    wanted = np.searchsorted(before, work.sum() * np.arange(stages) / stages)
    least = np.arange(stages)
    return np.minimum(np.maximum.accumulate(np.maximum(wanted - least, 0)) + least, len(work) - stages + least)


@cache
def _through_layers(
    rates: Rates, products: float, width: float, samples: float, depth: int, ranks: int
) -> float | None:
    """Seconds of multigrid through layers, forward and backward; None for too many ranks."""
    settings = MgritSettings(3, "16")
    if ranks > depth // math.prod(settings.factors(depth)):
        return None
    forward = (1 - BACKWARD) * rates.call, products * samples / rates.dense
    adjoint = BACKWARD * rates.call, 2 * forward[1]
    link = rates.link(ranks)
    costs = LayerCosts(forward, adjoint, link.latency, link.rate, int(width), math.ceil(samples))
    return predict(depth, ranks, settings, costs)


def crossover_batches(table: LayerTable) -> np.ndarray:
    """The batch of each layer at which its model split sends as much as its data split: 2 w = B (d_i + 2 d_{i-1})."""
    inner = np.arange(len(table.names)) > 0
    return 2 * table.weights / (table.outputs + 2 * inner * table.inputs)


def overtakes(planner: Planner, ranks: Sequence[int], margin: float = 1.02) -> int | None:
    """The first number of ranks on which a hybrid is faster than the data split on any ranks that the batch allows."""
    data = math.inf
    for each in ranks:
        if (step := planner.step(Split(data=each))) is not None:
            data = min(data, step.seconds)
        best = planner.best(each)
        if best.split != replace(Split(), data=best.split.data) and margin * best.seconds < data:
            return each
    return None
