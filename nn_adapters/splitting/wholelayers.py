"""Training by splitting, all samples in every iteration: the published form, and from the last layer down."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.splitting.layersplitting import LayerSplitting
from pdeopt.functions.gram import SharedGrams
from pdeopt.optimize.descent.minimizer import part_of


class WholeLayers(LayerSplitting):
    """All samples in every iteration, with multipliers for the outputs: the published form, or from the last down.

    Blocks are `("weights", k)` and `("z", k)` for k = 1 ... L, and `("a", k)` for k < L. The published form
    (-split_form seed) goes up through the layers and moves the multipliers half as far as the Lagrangian asks for.

    Example:
        >>> result = ADMM(WholeLayers(network, x, y, settings), warm_up=10).solve()
    """

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, *rest: Any) -> None:
        super().__init__(network, x, y, *rest)
        L, settings = len(self.layers), self.settings
        self._first = 1 if settings.form == "seed" else L
        shapes = [(layer.inputs, layer.outputs) for layer in self.layers]
        self._grams = [SharedGrams([s], self.team, settings.precision, self.W[0].dtype, rho=0.0) for s in shapes]
        self.take(torch.arange(self.samples), ([0.0] + [settings.beta] * L, [0.0] + [settings.gamma] * (L - 1)))
        if settings.states == "random":
            self._randomize()

    def _randomize(self) -> None:
        """Normal states; a sample's are the same on any number of ranks."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        for states in (self.states.a, self.states.z):
            for k in range(1, len(states)):
                whole = torch.randn(self.samples, *states[k].shape[1:], generator=generator, dtype=states[k].dtype)
                states[k] = whole[self.begin : self.begin + len(self.x)]
        self.states.forget()

    def sweep(self, iteration: int) -> Iterator[Hashable]:
        L = len(self.layers)
        for k in range(1, L + 1) if self.settings.form == "seed" else range(L, 0, -1):
            yield "weights", k
            if k < L:
                yield "a", k
            yield "z", k

    def update(self, block: Any) -> None:
        kind, k = block
        if kind == "weights":
            self._update_weights(k)
        else:
            self.update_own(kind, k)

    def _update_weights(self, k: int) -> None:
        """W_k = argmin beta |z_k + lambda / (2 beta) - W [a_{k-1}; 1]|^2 over the samples of all ranks."""
        states = self.states
        z = states.z[k] + states.multiplier / (2 * states.beta[k]) if k == len(self.layers) else states.z[k]
        self.add(self._grams[k - 1], 0, k, states.a[k - 1], z)
        (new,) = self.solve(self._grams[k - 1])
        self.moved = float((self.W[k - 1] - new).norm()) + (self.moved if k != self._first else 0.0)
        self.W[k - 1].copy_(new)
        states.forget(k)

    def ascend(self) -> None:
        """lambda <- lambda + 2 beta_L (z_L - m_L); the published form takes half of it."""
        L, states = len(self.layers), self.states
        factor = 1.0 if self.settings.form == "seed" else 2.0
        states.multiplier = states.multiplier + factor * states.beta[L] * (states.z[L] - states.mapped(L))

    def objective(self) -> float:
        """The mean loss of z_L."""
        return self.over_ranks(float(self.loss.value(self.states.z[-1], self.states.y).sum()))

    def residuals(self) -> tuple[float, float]:
        """The root of the mean of |z_L - m_L|^2 over the samples, and the last move of the weights.

        The other residuals have penalties alone, so that they do not vanish.
        """
        residual = self.states.z[-1] - self.states.mapped(len(self.layers))
        return math.sqrt(self.over_ranks(float(residual.square().sum()))), self.moved

    def memory(self) -> dict[str, Any]:
        states, grams = self.states, [grams.memory() for grams in self._grams]
        kept = {f"a{k}": a.clone() for k, a in enumerate(states.a)} | {
            f"z{k}": z.clone() for k, z in enumerate(states.z)
        }
        kept |= {f"grams{k}.{name}": each for k, memory in enumerate(grams) for name, each in memory.items()}
        kept |= {"multiplier": states.multiplier.clone(), "moved": self.moved, "mapped": states.known}
        return super().memory() | kept

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        states = self.states
        states.a = [memory[f"a{k}"].clone() for k in range(len(states.a))]
        states.z = [memory[f"z{k}"].clone() for k in range(len(states.z))]
        states.multiplier, self.moved = memory["multiplier"].clone(), float(memory["moved"])
        states.forget()
        for k, grams in enumerate(self._grams):
            grams.recall(part_of(memory, f"grams{k}"))
        for k in memory["mapped"]:  # what a run of one piece has at this point, and does not count again
            states.mapped(k)
        self.work.products = float(memory["work"][0])
