"""Training by splitting: the layers of a network as a `SplitConstraint`, by whole samples or by a stream of batches.

Each block has an exact minimizer: W_k by least squares (transpose reduction over ranks), a_k by one matrix for all
samples, z_k by a proximal map for each entry (G. Taylor, R. Burmeister, Z. Xu, B. Singh, A. Patel, T. Goldstein,
Training neural networks without gradients: A scalable ADMM approach, ICML 2016).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.splitting.proximal import LOSSES, require_classes
from nn_adapters.splitting.splitlayers import split_layers
from nn_adapters.splitting.splitstates import SplitStates, finite
from pdeopt.core.errors import InputError
from pdeopt.core.messages import PRECISIONS
from pdeopt.core.settings import Settings, setting
from pdeopt.core.team import Team
from pdeopt.functions.gram import SharedGrams
from pdeopt.optimize.descent.minimizer import part_of
from pdeopt.optimize.splitting import SplitConstraint, SplitWork


@dataclass(frozen=True)
class SplitTrainingSettings(Settings, prefix="split_"):
    """Training by splitting."""

    loss: str = setting("hinge", "loss of the outputs", choices=tuple(LOSSES))
    form: str = setting(
        "streaming",
        "increments from batches; all samples in the published order; or all samples from the last layer backward",
        choices=("streaming", "seed", "backward"),
    )
    batch: int = setting(1000, "samples of a batch, those of all ranks together (streaming)", at_least=1)
    step: float = setting(3.0, "length of the increments at the start; it falls to 0 over the run (streaming)", above=0)
    momentum: float = setting(0.9, "of the increments (streaming)", at_least=0, at_most=0.999)
    forgetting: float = setting(0.9, "weight of earlier batches in Gram matrices (streaming)", at_least=0, at_most=1)
    ridge: float = setting(0.1, "Tikhonov parameter of the weights' least squares", at_least=0)
    softness: float = setting(
        0.1, "penalties of a layer relative to those of the layer after it (streaming)", above=0, at_most=1
    )
    beta: float = setting(0.2, "penalty of z = W a (seed, backward)", above=0)
    gamma: float = setting(20.0, "penalty of a = h(z) (seed, backward)", above=0)
    states: str = setting("forward", "first states (seed, backward)", choices=("forward", "random"))
    precision: str = setting("float32", "precision of messages between ranks", choices=tuple(PRECISIONS))
    seed: int = setting(0, "seed of the batches and of random states", at_least=0)


class LayerSplitting(SplitConstraint):
    """The layers of a network over samples that ranks share: what the forms of training by splitting have in common.

    Args:
        network: see `split_layers`; equal on all ranks. `design` writes its weights.
        x, y: this rank's samples, (samples, ...), with classes (samples,) or targets (samples, outputs). The samples of
            all ranks in a row are those of the problem: how they are dealt out does not change the weights.
        settings: how.
        team: of ranks.

    Attributes:
        layers, W: the network in split form, and its weights.
        states: the split variables of the samples at hand, see `SplitStates`.
        count: samples at hand, those of all ranks.

    Raises:
        InputError: a network that cannot be split, labels outside, samples that do not fit, more ranks than samples.
    """

    states: SplitStates
    count: int

    def __init__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        settings: SplitTrainingSettings | None = None,
        team: Team | None = None,
    ) -> None:
        self.settings, self.team, self.work = settings or SplitTrainingSettings(), team, SplitWork()
        self.layers, self.loss = split_layers(network), LOSSES[self.settings.loss]
        self.W = [layer.read() for layer in self.layers]
        self.x, self.y = x.flatten(1).to(self.W[0]), y
        counts = [len(self.x)] if team is None else team.allgather(len(self.x))
        self.begin, self.samples = sum(counts[: 0 if team is None else team.rank]), sum(counts)
        _check(self)
        self.moved = 0.0

    def take(self, rows: Tensor, penalties: tuple[list[float], list[float]]) -> None:
        """Work on these samples, as far as they are this rank's; a forward pass gives the states."""
        own = rows - self.begin
        own = own[(own >= 0) & (own < len(self.x))]
        self.count = len(rows)
        self.states = SplitStates(self.layers, self.W, self.loss, penalties, self.work, self.x[own], self.y[own])

    def add(self, grams: SharedGrams, place: int, k: int, a: Tensor, z: Tensor) -> None:
        """Add samples of layer k to sums."""
        grams.add(place, self.layers[k - 1].extended(a), z)
        self.work.products += len(a) * self.W[k - 1].shape[1] * sum(self.W[k - 1].shape)

    def solve(self, grams: SharedGrams) -> list[Tensor]:
        """The least squares of all samples that were added. Collective."""
        sent = grams.sent
        grams.reduce()
        found = [finite(X) for X in grams.solve([self.settings.ridge] * len(grams.shapes))]
        self.work.bytes += grams.sent - sent
        self.work.solves += sum(n**3 / 3 + m * n**2 for n, m in (grams.shapes[place] for place in grams.sums))
        return found

    def over_ranks(self, own: float) -> float:
        """The sum over the ranks, divided by the samples at hand."""
        return (own if self.team is None else float(self.team.allreduce(own))) / self.count

    def lagrangian(self) -> float:
        """The augmented Lagrangian, its mean over the samples, and ridge beta_k |W_k|^2 of the layers."""
        sizes = sum(beta * float(W.square().sum()) for beta, W in zip(self.states.beta[1:], self.W))
        return self.over_ranks(self.states.lagrangian()) + self.settings.ridge * sizes

    def design(self) -> Tensor:
        """All weights in a row; they are also written into the network."""
        for layer, W in zip(self.layers, self.W):
            layer.write(W)
        return torch.cat([W.reshape(-1) for W in self.W])

    def memory(self) -> dict[str, Any]:
        """What a restart with the same ranks needs of this rank."""
        return {f"W{k}": W.clone() for k, W in enumerate(self.W)}

    def recall(self, memory: dict[str, Any]) -> None:
        for k, W in enumerate(self.W):
            W.copy_(memory[f"W{k}"])


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
                whole = torch.randn(self.samples, states[k].shape[1], generator=generator, dtype=states[k].dtype)
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
        {"weights": self._update_weights, "a": self.states.update_state, "z": self.states.update_input}[kind](k)

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
        return super().memory() | kept | {"multiplier": states.multiplier.clone(), "moved": self.moved}

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        states = self.states
        states.a = [memory[f"a{k}"].clone() for k in range(len(states.a))]
        states.z = [memory[f"z{k}"].clone() for k in range(len(states.z))]
        states.multiplier, self.moved = memory["multiplier"].clone(), float(memory["moved"])
        states.forget()
        for k, grams in enumerate(self._grams):
            grams.recall(part_of(memory, f"grams{k}"))


class StreamedLayers(LayerSplitting):
    """A batch in every iteration, whose targets give all weights an increment; there are no multipliers.

    A forward pass leaves no residuals; from the outputs down, z_k and a_k move to where the loss wants them; then

        V <- momentum V + mean (z - m) a' (G + ridge)^-1,    W <- W + step V,

    with a and m of the forward pass and G the forgetting mean of aa'. Blocks are `("z", k)`, `("a", k)` and
    `("increments", iteration)`.

    Args:
        iterations: of the run, over which the length of the increments falls to zero.
        network, x, y, settings, team: as for `LayerSplitting`.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10))
        >>> splitting = StreamedLayers(180, network, x, y)
        >>> result = ADMM(splitting, max_it=180, multipliers=False, rtol=0.0).solve()
    """

    def __init__(self, iterations: int, network: nn.Module, x: Tensor, y: Tensor, *rest: Any) -> None:
        super().__init__(network, x, y, *rest)
        self.iterations, settings = iterations, self.settings
        shapes = [(layer.inputs, layer.outputs) for layer in self.layers]
        self._grams = SharedGrams(
            shapes, self.team, settings.precision, self.W[0].dtype, rho=settings.forgetting, cross=0.0
        )
        self._increments = [torch.zeros_like(W) for W in self.W]
        self._known: tuple[float, float] | None = None
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self.take(self._next_batch(), self._penalties())

    def _penalties(self) -> tuple[list[float], list[float]]:
        """Soft at the input and stiff at the output.

        An update of a_k weighs gamma_k against beta_{k+1} and the gamma_{k+1} of a skip, one of z_k beta_k against
        step^2 gamma_k: only their ratios count.
        """
        L, softness = len(self.layers), self.settings.softness
        beta, gamma = [0.0] * L + [1.0], [0.0] * L
        for k in range(L - 1, 0, -1):
            gamma[k] = softness * gamma[k + 1] if self.layers[k].skip else beta[k + 1]
            beta[k] = softness * self.layers[k - 1].step ** 2 * gamma[k]
        return beta, gamma

    def _next_batch(self) -> Tensor:
        """Numbers of the next samples of one random order after the other, the same on all ranks."""
        size = min(self.settings.batch, self.samples)
        if len(self._order) < size:
            self._order = torch.cat([self._order, torch.randperm(self.samples, generator=self._generator)])
        batch, self._order = self._order[:size], self._order[size:]
        return batch

    def sweep(self, iteration: int) -> Iterator[Hashable]:
        if iteration > 1:
            self.take(self._next_batch(), (self.states.beta, self.states.gamma))
        L, self._known = len(self.layers), None
        yield "z", L
        for k in range(L - 1, 0, -1):
            yield "a", k
            yield "z", k
        yield "increments", iteration

    def update(self, block: Any) -> None:
        kind, k = block
        {"increments": self._move, "a": self.states.update_state, "z": self.states.update_input}[kind](k)

    def _move(self, iteration: int) -> None:
        a, m = self.states.start
        for k in range(1, len(self.layers) + 1):
            self.add(self._grams, k - 1, k, a[k - 1], self.states.z[k] - m[k])
        found = self.solve(self._grams)
        step = self.settings.step * (1.0 - (iteration - 1) / self.iterations)
        increments = [self.settings.momentum * V + X for V, X in zip(self._increments, found)]
        new = [finite(W + step * V) for W, V in zip(self.W, increments)]
        self._increments = increments
        for W, value in zip(self.W, new):
            W.copy_(value)
        self.moved = step * math.sqrt(sum(float(V.square().sum()) for V in increments))

    def ascend(self) -> None:
        """Nothing: a stream keeps no multipliers, as each batch has samples of its own."""

    def objective(self) -> float:
        """The mean loss of the batch before its step."""
        return self._numbers()[0]

    def residuals(self) -> tuple[float, float]:
        """The root of the mean of |z_L - m_L|^2 over the batch, and the last move of the weights."""
        return self._numbers()[1], self.moved

    def _numbers(self) -> tuple[float, float]:
        """Loss and residual of the batch; after a restart those that were kept, as the batch is not."""
        if self._known is None:
            states, outputs = self.states, self.states.start[1][-1]
            loss = self.over_ranks(float(self.loss.value(outputs, states.y).sum()))
            self._known = loss, math.sqrt(self.over_ranks(float((states.z[-1] - outputs).square().sum())))
        return self._known

    def memory(self) -> dict[str, Any]:
        kept = {f"V{k}": V.clone() for k, V in enumerate(self._increments)}
        kept |= {f"grams.{name}": each for name, each in self._grams.memory().items()}
        kept |= {"order": self._order.clone(), "generator": self._generator.get_state()}
        return super().memory() | kept | dict(zip(("loss", "residual", "moved"), (*self._numbers(), self.moved)))

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self._increments = [memory[f"V{k}"].clone() for k in range(len(self.W))]
        self._order, self.moved = memory["order"].clone(), float(memory["moved"])
        self._known = float(memory["loss"]), float(memory["residual"])
        self._generator.set_state(memory["generator"])
        self._grams.recall(part_of(memory, "grams"))


def _check(splitting: LayerSplitting) -> None:
    x, y, layers = splitting.x, splitting.y, splitting.layers
    if len(y) != len(x):
        raise InputError("samples and labels", f"{len(x)} and {len(y)}", "the same number")
    ranks = 1 if splitting.team is None else splitting.team.size
    if splitting.samples < ranks:
        raise InputError("samples", splitting.samples, f">= {ranks}, the ranks")
    if x.shape[1] != layers[0].linear.in_features:
        raise InputError("entries of a sample", x.shape[1], f"{layers[0].linear.in_features}")
    if not y.is_floating_point():
        require_classes(y, layers[-1].outputs)
    if not bool(torch.isfinite(x).all()):
        raise InputError("samples", "NaN or infinite entries", "finite numbers")
