"""Training by splitting, all samples in every iteration: the published form, and from the last layer down."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import Tensor, nn

from nn_adapters.splitting.layersplitting import LayerSplitting
from nn_adapters.splitting.splitstates import SplitStates
from nn_adapters.splitting.wholestates import WholeStates
from pdeopt.optimize.descent.minimizer import part_of
from pdeopt.squares.sharedgrams import SharedGrams


class WholeLayers(LayerSplitting):
    """All samples in every iteration, with multipliers for the outputs: the published form, or from the last down.

    Blocks are `("weights", k)` and `("z", k)` for k = 1 ... L, and `("a", k)` for k < L; `("sums", k)` before
    `("weights", k)` changes nothing. The published form (-split_form seed) goes up through the layers and moves the
    multipliers half as far as the Lagrangian asks for.

    W_k and a_k do not depend on each other's update: the sums for W_k are on their way while a_k moves.

    Memory is that of the states: all work goes through chunks of samples, in place. A block whose numbers are no longer
    finite is left with those of the chunks before.

    Example:
        >>> result = ADMM(WholeLayers(network, x, y, settings), warm_up=10).solve()
    """

    states: WholeStates

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, *rest: Any) -> None:
        super().__init__(network, x, y, *rest)
        L, settings = len(self.layers), self.settings
        self._first, self.count = 1 if settings.form == "seed" else L, self.samples
        self._grams = [
            SharedGrams([(m.inputs, m.outputs)], self.team, settings.precision, self.W[0].dtype, 0.0, fixed=k == 0)
            for k, m in enumerate(self.layers)
        ]
        penalties = [0.0] + [settings.beta] * L, [0.0] + [settings.gamma] * (L - 1)
        self.states = WholeStates(self.layers, self.W, self.loss, penalties, self.work, self.x, self.y)
        if settings.states == "random":
            self.states.draw(settings.seed, self.samples, self.first_row)
        else:
            self.states.go_forward()

    def sweep(self, iteration: int) -> Iterator[Hashable]:
        L = len(self.layers)
        for k in range(1, L + 1) if self.settings.form == "seed" else range(L, 0, -1):
            yield "sums", k
            if k < L:
                yield "a", k
            yield "weights", k
            yield "z", k

    def update(self, block: Any) -> None:
        kind, k = block
        {"sums": self._sum, "a": self._update_state, "weights": self._update_weights, "z": self._update_input}[kind](k)

    def _sum(self, k: int) -> None:
        """The sums for W_k = argmin beta |z_k + lambda / (2 beta) - W [a_{k-1}; 1]|^2 over the samples of all ranks."""
        for part in self.states.parts():
            z = part.z[k] + part.multiplier / (2 * part.beta[k]) if k == len(self.layers) else part.z[k]
            self.add(self._grams[k - 1], 0, k, part.a[k - 1], z)
        self.begin(self._grams[k - 1])

    def _update_weights(self, k: int) -> None:
        (new,) = self.solve(self._grams[k - 1])
        self.moved = float((self.W[k - 1] - new).norm()) + (self.moved if k != self._first else 0.0)
        self.W[k - 1].copy_(new)

    def _update_state(self, k: int) -> None:
        solver = self.states.solver(k)
        for part in self.states.parts():
            old = part.a[k]
            self.update_own(part, "a", k, solver)
            old.copy_(part.a[k])
            self._grams[k - 1].advance()

    def _update_input(self, k: int) -> None:
        for part in self.states.parts():
            old = part.z[k]
            self.update_own(part, "z", k)
            old.copy_(part.z[k])

    def _total(self, value: Callable[[SplitStates], float]) -> float:
        """The sum of the values of all chunks of all ranks, divided by the samples; not counted. Collective."""
        products = self.work.products
        own = sum(map(value, self.states.parts()))
        self.work.products = products
        return self.over_ranks(own)

    def lagrangian(self) -> float:
        return self._total(lambda part: part.lagrangian()) + self.ridges()

    def ascend(self) -> None:
        """lambda <- lambda + 2 beta_L (z_L - m_L); the published form takes half of it."""
        L = len(self.layers)
        factor = 1.0 if self.settings.form == "seed" else 2.0
        for part in self.states.parts():
            part.multiplier += factor * part.beta[L] * (part.z[L] - part.mapped(L))

    def objective(self) -> float:
        """The mean loss of z_L."""
        return self._total(lambda part: float(self.loss.value(part.z[-1], part.y).sum()))

    def residuals(self) -> tuple[float, float]:
        """The root of the mean of |z_L - m_L|^2 over the samples, and the last move of the weights.

        The other residuals have penalties alone, so that they do not vanish.
        """
        L = len(self.layers)
        return math.sqrt(self._total(lambda part: float((part.z[L] - part.mapped(L)).square().sum()))), self.moved

    def predicted_memory(self) -> dict[str, int]:
        states = self.states
        whole = sum(each.nbytes for each in states.a[1:] + states.z[1:])
        return self._footprint(self._grams, whole, states.multiplier.nbytes, states.footprint)

    def memory(self) -> dict[str, Any]:
        memories = [grams.memory() for grams in self._grams]
        kept = {f"grams{k}.{name}": each for k, memory in enumerate(memories) for name, each in memory.items()}
        return super().memory() | self.states.memory() | kept | {"moved": self.moved}

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self.states.recall(memory)
        self.moved = float(memory["moved"])
        for k, grams in enumerate(self._grams):
            grams.recall(part_of(memory, f"grams{k}"))
