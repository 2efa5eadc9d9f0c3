"""Training by splitting, a stream of batches: transpose reduction of increments with forgetting."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.splitting.affinemaps import finite
from nn_adapters.splitting.layersplitting import LayerSplitting
from nn_adapters.splitting.wholestates import AT_ONCE
from pdeopt.optimize.descent.minimizer import part_of
from pdeopt.squares.sharedgrams import SharedGrams


class StreamedLayers(LayerSplitting):
    """A batch in every iteration, whose targets give all weights an increment; there are no multipliers.

    A forward pass leaves no residuals; from the outputs down, z_k and a_k move to where the loss wants them; then

        X = mean (z - m) a' (G + ridge)^-1,    V <- momentum V + (1 - momentum) X / change,    W <- W + step V,

    with a and m of the forward pass and G the forgetting mean of aa'. To the ridge comes a share of the trace of G, the
    mean of |a|^2, so that it knows the scale of the samples. `change`, a number for each layer, is what makes one step
    fit all networks: the root mean square, over the iterations so far and the entries of m, of the change of m by X.
    Targets say into which direction m has to go, and for which samples how far; how far all in all depends on
    penalties, depth, loss and data. X falls with the errors, and the mean over all iterations remembers how large they
    were. With `-split_scaling none` it is 1: one increment of length 1 is then the least squares of the targets.
    Blocks are `("z", k)`, `("a", k)` and `("increments", iteration)`.

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
        self._changes = torch.zeros(len(shapes), dtype=torch.float64)
        self._known: tuple[float, float] | None = None
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self.take(self._next_batch(), self._penalties())

    def _penalties(self) -> tuple[list[float], list[float]]:
        """Soft at the input and stiff at the output; beta_L = 1.

        An update of a_k weighs gamma_k against beta_{k+1} and the gamma_{k+1} of a skip, one of z_k beta_k against
        step^2 gamma_k: only their ratios count. With beta_k proportional to step, a layer of an ODE network takes a
        share of the error in proportion to step, so that the layers of a time share alike however fine they are.
        """
        L, softness = len(self.layers), self.settings.softness
        beta, gamma = [0.0] * L + [1.0], [0.0] * L
        for k in range(L - 1, 0, -1):
            gamma[k] = softness * gamma[k + 1] if self.layers[k].skip else beta[k + 1] / softness
            beta[k] = softness * self.layers[k - 1].step * gamma[k]
        return beta, gamma

    def _next_batch(self) -> Tensor:
        """Numbers of the next samples of one random order after the other, the same on all ranks."""
        size = self.settings.batch_of(self.samples)
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
        if kind == "increments":
            self._move(k)
        else:
            self.update_own(self.states, kind, k)

    def _move(self, iteration: int) -> None:
        a, m = self.states.start
        for k in range(1, len(self.layers) + 1):
            self.add(self._grams, k - 1, k, a[k - 1], self.states.z[k] - m[k])
        self.begin(self._grams)
        found = self.solve(self._grams, self.settings.ridge_share)
        found_squares, sizes = self._squares(found, m)
        changes = self._changes + found_squares
        scales = self._scales(changes, sizes, iteration)
        step, momentum = self.settings.step * (1.0 - (iteration - 1) / self.iterations), self.settings.momentum
        increments = [
            momentum * V + (1.0 - momentum) / scale * X for V, X, scale in zip(self._increments, found, scales)
        ]
        new = [finite(W + step * V) for W, V in zip(self.W, increments)]
        self._increments, self._changes = increments, changes
        for W, value in zip(self.W, new):
            W.copy_(value)
        self.moved = step * math.sqrt(sum(float(V.square().sum()) for V in increments))

    def _squares(self, found: list[Tensor], m: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The mean squares of the change of m by the increments, and of m, over samples and entries, of each layer.

        Collective.
        """
        done = self._grams.solves
        changes = self._grams.squares(found, [self.settings.ridge] * len(found), self.settings.ridge_share)
        self.work.solves += self._grams.solves - done
        sizes = torch.tensor([float(each.double().square().sum()) / self.count for each in m[1:]], dtype=torch.float64)
        own = torch.stack([changes, sizes])
        whole = own if self.team is None else torch.from_numpy(self.team.allreduce(own.numpy()))
        entries = [self.states.z[k].shape[1:].numel() for k in range(1, len(self.layers) + 1)]
        changes, sizes = (whole / torch.tensor(entries)).clamp(min=0.0)
        return changes, sizes

    def _scales(self, changes: Tensor, sizes: Tensor, iteration: int) -> list[float]:
        """What to divide the increments of each layer by; 1 where they were rounding so far.

        So they are before dead neurons, and everywhere where the loss has nothing to gain: divided by their own size
        they would be steps of full length at random.
        """
        if self.settings.scaling == "none":
            return [1.0] * len(changes)
        means = (changes / iteration).sqrt()
        least = 10.0 * torch.finfo(self.W[0].dtype).eps * torch.maximum(means.max(), sizes.sqrt())
        return torch.where(means > least, means, 1.0).tolist()  # type: ignore[no-any-return]

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

    def predicted_memory(self) -> dict[str, int]:
        """States, as long as no batch has more samples of this rank than its share: those of two batches, one of them
        before and after its updates; a few copies of the largest while a proximal map works; an order of the samples.
        """
        states, share = self.states, math.ceil(self.count * len(self.x) / self.samples)
        each = [kept.nbytes // max(1, len(kept)) for kept in states.a[1:] + states.z[1:]]
        row = 3 * sum(each) + 2 * self.x.nbytes // max(1, len(self.x))
        weights = sum(W.nbytes for W in self.W)
        found = self._footprint([self._grams], share * row, 0, AT_ONCE * share * max(each))
        order = 2 * self._order.element_size() * self.samples
        return found | {"data": found["data"] + order, "weights": found["weights"] + 4 * weights}

    def memory(self) -> dict[str, Any]:
        kept = {f"V{k}": V.clone() for k, V in enumerate(self._increments)}
        kept |= {f"grams.{name}": each for name, each in self._grams.memory().items()}
        kept |= {
            "changes": self._changes.clone(),
            "order": self._order.clone(),
            "generator": self._generator.get_state(),
        }
        return super().memory() | kept | dict(zip(("loss", "residual", "moved"), (*self._numbers(), self.moved)))

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self._increments = [memory[f"V{k}"].clone() for k in range(len(self.W))]
        self._changes = memory["changes"].clone()
        self._order, self.moved = memory["order"].clone(), float(memory["moved"])
        self._known = float(memory["loss"]), float(memory["residual"])
        self._generator.set_state(memory["generator"])
        self._grams.recall(part_of(memory, "grams"))
