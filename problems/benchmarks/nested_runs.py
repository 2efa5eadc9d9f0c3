"""Nested iteration against full depth, on many runs at once: the run is one more batch axis.

Peaks, tanh, T = 1; 5000 points, full batches, Adam; 8, 16, 32 layers, a third of the work on each, against 32 layers
all the time with the same work. Published setting: E. C. Cyr, S. Guenther, J. B. Schroder.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

from nn_adapters.data.generated import peaks
from nn_adapters.training.nested import refine_weights

LAYERS, LEVELS, T, LR = 32, 3, 5.0, 2e-2
BATCH = 500


class Runs:
    """Networks of many runs; parameters have the run as an axis, layers come first.

    Args:
        channels: width.
        runs: (Tikhonov weight, size of the first weights, seed) of each.
        layers: at the beginning.
    """

    def __init__(self, channels: int, runs: list[tuple[float, float, int]], layers: int) -> None:
        self.gamma = torch.tensor([tikhonov for tikhonov, _, _ in runs])

        def draw(*shape: int, fan: int, small: bool = False) -> Tensor:
            parts = []
            for _, initial, seed in runs:
                generator = torch.Generator().manual_seed(seed * 1009 + fan + len(shape))
                part = torch.randn(*shape, generator=generator)
                parts.append(part * (initial if small else 1.0 / math.sqrt(fan)))
            return torch.stack(parts, dim=1 if small else 0)

        w = channels
        self.opening = [draw(2, w, fan=2), draw(1, w, fan=2)]
        self.closing = [draw(w, 5, fan=w), torch.zeros(len(runs), 1, 5)]
        self.layers = [draw(layers, w, w, fan=w, small=True), draw(layers, 1, w, fan=w, small=True)]

    def parameters(self) -> list[Tensor]:
        return [*self.opening, *self.layers, *self.closing]

    def deepen(self) -> None:
        """Twice as many layers, their weights piecewise constant in time."""
        self.layers = [refine_weights(stack.detach(), 2) for stack in self.layers]

    def logits(self, x: Tensor) -> Tensor:
        """(runs, samples, classes) of samples (samples, 2) or (runs, samples, 2)."""
        u = torch.tanh(x @ self.opening[0] + self.opening[1])
        W, b = self.layers
        for i in range(len(W)):
            u = torch.add(u, torch.tanh(torch.baddbmm(b[i], u, W[i])), alpha=T / len(W))
        return torch.baddbmm(self.closing[1], u, self.closing[0])

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum over runs: each sees its own gradient."""
        logits = self.logits(x)
        runs = len(logits)
        value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(runs)) * runs
        dt = T / len(self.layers[0])
        size = sum((stack.square().flatten(2).sum(2).sum(0)) * dt for stack in self.layers)
        return value + 0.5 * (self.gamma * size).sum()


def train(runs: Runs, x: Tensor, y: Tensor, iterations: int, progress: tuple[float, float], generator: Any) -> None:
    """Adam at one depth, its rate a cosine of the share of the work done, which goes through `progress`."""
    parameters = [p.detach().requires_grad_() for p in runs.parameters()]
    runs.opening, runs.layers, runs.closing = parameters[:2], parameters[2:4], parameters[4:]
    optimizer = torch.optim.Adam(parameters, lr=LR)
    for k in range(iterations):
        share = progress[0] + (progress[1] - progress[0]) * k / iterations
        optimizer.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * share))
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        runs.loss(x[rows], y[rows]).backward()
        optimizer.step()


def compare(channels: int, seeds: int, iterations: int) -> dict[str, Any]:
    """Statistics of the validation accuracy, in percent, over all runs."""
    torch.set_num_threads(1)
    cases = [(g, w, s) for g, w, s in product((1e-5, 1e-7), (0.0, 1e-6), range(seeds))]
    data = peaks(0)
    result = {}
    for kind, levels in (("nested", LEVELS), ("not nested", 1)):
        generator = torch.Generator().manual_seed(7)
        runs = Runs(channels, cases, LAYERS >> (levels - 1))
        for level in range(levels):
            if level:
                runs.deepen()
            count = iterations * (1 << (levels - 1 - level)) // levels  # the same work on each level
            train(runs, data.x_train, data.y_train, count, (level / levels, (level + 1) / levels), generator)
        with torch.no_grad():
            right = (runs.logits(data.x_test).argmax(2) == data.y_test).double().mean(1) * 100
        result[kind] = {
            "mean": float(right.mean()),
            "median": float(right.median()),
            "max": float(right.max()),
            "min": float(right.min()),
            "std": float(right.std()),
        }
    return result
