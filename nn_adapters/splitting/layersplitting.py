"""Training by splitting: the layers of a network as a `SplitConstraint`; what all its forms have in common.

Each block has an exact minimizer: W_k by least squares (transpose reduction over ranks), a_k by one matrix for all
samples, z_k by a proximal map for each entry (G. Taylor, R. Burmeister, Z. Xu, B. Singh, A. Patel, T. Goldstein,
Training neural networks without gradients: A scalable ADMM approach, ICML 2016).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.splitting.affinemaps import Solver, finite
from nn_adapters.splitting.proximal import LOSSES, require_classes
from nn_adapters.splitting.splitlayers import require_fit, split_layers
from nn_adapters.splitting.splitstates import SplitStates
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.memory import used_memory
from pdeopt.core.messages import PRECISIONS
from pdeopt.core.settings import Settings, check, setting
from pdeopt.core.team import Team
from pdeopt.optimize.splitting import SplitConstraint, SplitWork
from pdeopt.squares.sharedgrams import SharedGrams

#: Bytes of the process with what this module imports.
IMPORTED = int(used_memory()[0])

#: Bytes that the first calls of PyTorch and of two libraries of linear algebra touch, measured with tiny layers.
LIBRARIES = 18_000_000

#: Rows that are added to Gram sums at once.
ROWS = 2**17


@dataclass(frozen=True)
class SplitTrainingSettings(Settings, prefix="split_"):
    """Training by splitting."""

    loss: str = setting("hinge", "loss of the outputs", choices=tuple(LOSSES))
    form: str = setting(
        "streaming",
        "increments from batches; all samples in the published order; or all samples from the last layer backward",
        choices=("streaming", "seed", "backward"),
    )
    batch: int = setting(
        0, "samples of a batch, of all ranks together; 0: a tenth of all, but 1000 at the most (streaming)", at_least=0
    )
    step: float = setting(0.1, "length of the increments at the start; it falls to 0 over the run (streaming)", above=0)
    scaling: str = setting(
        "layers",
        "measure increments by the change that they make to the outputs of a layer, or not at all (streaming)",
        choices=("layers", "none"),
    )
    momentum: float = setting(0.9, "of the increments (streaming)", at_least=0, at_most=0.999)
    forgetting: float = setting(0.9, "weight of earlier batches in Gram matrices (streaming)", at_least=0, at_most=1)
    ridge: float = setting(0.1, "Tikhonov parameter of the weights' least squares", at_least=0)
    ridge_share: float = setting(
        0.006, "more of it, relative to the mean of |a|^2 of the samples that come to a layer (streaming)", at_least=0
    )
    softness: float = setting(
        0.3, "penalty of z = W a relative to those of a = h(z) before and after it (streaming)", above=0, at_most=1
    )
    beta: float = setting(0.2, "penalty of z = W a (seed, backward)", above=0)
    gamma: float = setting(20.0, "penalty of a = h(z) (seed, backward)", above=0)
    states: str = setting("forward", "first states (seed, backward)", choices=("forward", "random"))
    precision: str = setting("float32", "precision of messages between ranks", choices=tuple(PRECISIONS))
    seed: int = setting(0, "seed of the batches and of random states", at_least=0)

    def batch_of(self, samples: int) -> int:
        """Samples of a batch, of so many on all ranks."""
        return min(self.batch or max(1, min(1000, samples // 10)), samples)


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
        InputError: settings that are not legal, a network that cannot be split, labels outside, samples that do not
            fit, more ranks than samples.
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
        check(self.settings)
        self.layers, self.loss = split_layers(network), LOSSES[self.settings.loss]
        self.W = [layer.map.read() for layer in self.layers]
        self.x, self.y = x.to(self.W[0]), y
        counts = [len(self.x)] if team is None else team.allgather(len(self.x))
        self.first_row, self.samples = sum(counts[: 0 if team is None else team.rank]), sum(counts)
        _check(self)
        self.moved = 0.0

    def take(self, rows: Tensor, penalties: tuple[list[float], list[float]]) -> None:
        """Work on these samples, as far as they are this rank's; a forward pass gives the states."""
        own = rows - self.first_row
        own = own[(own >= 0) & (own < len(self.x))]
        self.count = len(rows)
        vars(self).pop("states", None)  # room for those that come
        self.states = SplitStates(self.layers, self.W, self.loss, penalties, self.work, self.x[own], self.y[own])

    def add(self, grams: SharedGrams, place: int, k: int, a: Tensor, z: Tensor) -> None:
        """Add samples of layer k to sums: of a convolution all positions, which weigh as much as one of a dense layer.

        A sample is one however many positions it has, as in the Lagrangian.
        """
        map, done = self.layers[k - 1].map, grams.products
        positions = max(1, z[0].numel() // map.outputs) if len(z) else 1
        size = max(1, ROWS // positions)  # patches are larger than the image
        for one, other in zip(a.split(size), z.split(size)):
            grams.add(place, map.rows(one), other.movedim(1, -1).reshape(-1, map.outputs), len(one))
        self.work.products += grams.products - done

    def begin(self, grams: SharedGrams) -> None:
        """All samples have been added: their sums leave. Collective."""
        sent = grams.sent
        grams.begin()
        self.work.bytes += grams.sent - sent

    def update_own(self, states: SplitStates, kind: str, k: int, *solver: Solver) -> None:
        """An update of some of this rank's samples, "a" or "z" of layer k, without a message.

        Where it breaks down on one of several ranks, its numbers are NaN from then on, so that the least squares that
        follow, a call of all ranks, end on all of them.
        """
        try:
            {"a": states.update_state, "z": states.update_input}[kind](k, *solver)
        except SolveFailure:
            if self.team is None or self.team.size == 1:
                raise
            block = getattr(states, kind)
            block[k] = torch.full_like(block[k], torch.nan)
            states.forget()

    def solve(self, grams: SharedGrams, share: float = 0.0) -> list[Tensor]:
        """The least squares of all samples that were added, after `begin`; with `share`, see there. Collective."""
        sent, solves = grams.sent, grams.solves
        grams.finish()
        found = [finite(X) for X in grams.solve([self.settings.ridge] * len(grams.shapes), share)]
        self.work.bytes += grams.sent - sent
        self.work.solves += grams.solves - solves
        return found

    def over_ranks(self, own: float) -> float:
        """The sum over the ranks, divided by the samples at hand."""
        return (own if self.team is None else float(self.team.allreduce(own))) / self.count

    def lagrangian(self) -> float:
        """The augmented Lagrangian, its mean over the samples, and ridge beta_k |W_k|^2 of the layers."""
        return self.over_ranks(self.states.lagrangian()) + self.ridges()

    def ridges(self) -> float:
        """The ridge of the weights, ridge sum_k beta_k |W_k|^2."""
        sizes = (beta * float(W.square().sum()) for beta, W in zip(self.states.beta[1:], self.W))
        return self.settings.ridge * sum(sizes)

    @abstractmethod
    def predicted_memory(self) -> dict[str, int]:
        """Bytes of this rank at the most, by parts, from shapes alone but for the first.

        Returns:
            `process`: as measured when this module had been imported; `libraries`: what their first calls touch;
            `data`; `weights`: of the network, of the split form and of increments; `states`; `multiplier`; `grams`;
            `messages`; `workspace`. Their sum is the prediction.
        """

    def _footprint(self, grams: Sequence[SharedGrams], states: int, multiplier: int, workspace: int) -> dict[str, int]:
        """The parts, with those that all forms have alike; messages and solves of one of the Gram sums at a time."""
        own = sum(W.nbytes for W in self.W)
        module = sum(each.nbytes for layer in self.layers for each in layer.map.module.parameters())
        each = [one.footprint() for one in grams]
        return {
            "process": IMPORTED,
            "libraries": LIBRARIES,
            "data": self.x.nbytes + self.y.nbytes,
            "weights": own + module,
            "states": states,
            "multiplier": multiplier,
            "grams": sum(one["sums"] for one in each),
            "messages": max(one["messages"] for one in each),
            "workspace": workspace + max(one["solve"] for one in each),
        }

    def design(self) -> Tensor:
        """All weights in a row; they are also written into the network."""
        for layer, W in zip(self.layers, self.W):
            layer.map.write(W)
        return torch.cat([W.reshape(-1) for W in self.W])

    def memory(self) -> dict[str, Any]:
        """What a restart with the same ranks needs of this rank."""
        work = torch.tensor(astuple(self.work), dtype=torch.float64)
        return {f"W{k}": W.clone() for k, W in enumerate(self.W)} | {"work": work}

    def recall(self, memory: dict[str, Any]) -> None:
        for k, W in enumerate(self.W):
            W.copy_(memory[f"W{k}"])
        self.work.products, self.work.solves, sent = memory["work"].tolist()
        self.work.bytes = int(sent)


def _check(splitting: LayerSplitting) -> None:
    x, y, layers = splitting.x, splitting.y, splitting.layers
    if len(y) != len(x):
        raise InputError("samples and labels", f"{len(x)} and {len(y)}", "the same number")
    ranks = 1 if splitting.team is None else splitting.team.size
    if splitting.samples < ranks:
        raise InputError("samples", splitting.samples, f">= {ranks}, the ranks")
    require_fit(layers, tuple(x.shape[1:]))
    if not y.is_floating_point():
        require_classes(y, layers[-1].outputs)
    elif splitting.settings.loss != "squared" or y.shape != (len(x), layers[-1].outputs):
        legal = f"classes, or (samples, {layers[-1].outputs}) with the squared loss"
        raise InputError(f"targets with the loss {splitting.settings.loss}", tuple(y.shape), legal)
    if x.numel() and not all(map(math.isfinite, map(float, x.aminmax()))):
        raise InputError("samples", "NaN or infinite entries", "finite numbers")
