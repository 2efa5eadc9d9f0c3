"""The base of optimizers that ask more of a network than its gradient."""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nn_adapters.curvature.layers import curved_layers
from nn_adapters.curvature.likelihoods import Likelihood
from nn_adapters.curvature.products import FisherMatrix, by_layer, flat
from nn_adapters.layers.batching import is_random
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.settings import Settings, check
from pdeopt.core.team import Team

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Before:
    """What a batch B finds before the last step s, at theta - s.

    Attributes:
        loss: f_B(theta - s), with its regularization.
        gradient: of f_B there; of several ranks, the part of this one.
        slope: gradient.s.
        curvature: s.(F_B + l2)s there.
    """

    loss: float
    gradient: Tensor
    slope: float
    curvature: float


class SecondOrder(torch.optim.Optimizer):
    """An optimizer of PyTorch that knows the network, its loss and the inputs of the batch.

    `step(closure)` takes the closure that PyTorch's optimizers take: it clears the gradients, evaluates the loss of a
    batch, calls `backward` and returns the loss. It may be called again with other parameters, as L-BFGS does. `step()`
    takes the gradients that are there; what needs another value of the loss is left out. The inputs are those that the
    network was called with in training mode, with gradients, since the last `zero_grad`; of several calls, all.

    A subclass writes `advance`.

    Args:
        network, likelihood, seed: see `KFAC`.
        l2: weight of |theta|^2 / 2, which the closure does not have.
        decay: share of the weights that a step takes away.
        team: ranks with samples of their own, see `KFAC`.

    Raises:
        InputError: a network with random numbers in training mode, or a layer without a block of curvature.
    """

    def __init__(
        self, network: nn.Module, likelihood: Likelihood, l2: float, decay: float, seed: int, team: Team | None = None
    ) -> None:
        noisy = next((part for part in network.modules() if part.training and is_random(part)), None)
        if noisy is not None:
            raise InputError("network", f"{type(noisy).__name__} in training mode", "a network without random numbers")
        self.network, self.likelihood, self.l2, self.decay = network, likelihood, l2, decay
        self.team, self._share = team, 1.0
        self.layers = curved_layers(network)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps, self._watching = 0, True
        self.inputs: list[tuple[Any, ...]] = []
        self.targets: list[Any] = []
        super().__init__([p for layer in self.layers for p in layer.parameters], {})
        network.register_forward_pre_hook(_Watcher(weakref.ref(self)))

    @abstractmethod
    def advance(self, loss: float, g: Tensor, again: Callable[[], Before] | None) -> Tensor:
        """The step from here, flat.

        Args:
            loss: of the batch, with its regularization; NaN where it is not known.
            g: its gradient, (size,).
            again: () -> the batch before the last step; None where there is no closure.
        """

    #: The last step, and inside of `advance` the loss of the batch at theta + shift, where there is a closure.
    last: Tensor | None
    value: Callable[[Tensor], float] | None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forget the inputs of the batch."""
        self._forget()
        super().zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Change the parameters.

        Args:
            closure: see the class.

        Returns:
            what the closure returned, the loss before the step.

        Raises:
            InputError: no input of the network is known.
            SolveFailure: a loss or a gradient that is not finite; nothing has changed.
        """
        value = None
        if closure is not None:
            self._forget()
            with torch.enable_grad():
                value = closure()
        self.targets = list(self.likelihood.seen)
        if not self.inputs:
            raise InputError(f"{type(self).__name__}.step", "no inputs", "a network in training mode, called before")
        self._share = self._share_of(sum(len(arguments[0]) for arguments in self.inputs))
        loss, g = math.nan if value is None else self.over_ranks(self._own_loss(value)), self.gradient()
        if self.over_ranks(float(not bool(g.isfinite().all()))) or (value is not None and not math.isfinite(loss)):
            raise SolveFailure(f"a loss of {loss}, or its gradient, is not finite", "smaller steps, or other samples")
        self._watching = False  # what follows calls the network for its derivatives
        try:
            loss += self.l2 * _half_square(self.parameters())
            self.value = None if closure is None else lambda shift: self._value(closure, shift)
            step = self.advance(loss, g, None if closure is None else lambda: self._before(closure))
        finally:
            self._watching, self.value = True, None
        self.move(step)
        self._forget()
        self.steps += 1
        return value

    def over_ranks(self, own: float) -> float:
        """The sum over the ranks."""
        return own if self.team is None else float(self.team.allreduce(own))

    def _share_of(self, samples: int) -> float:
        """The weight of this rank's loss in that of all."""
        return samples / self.over_ranks(samples) if self.likelihood.reduction == "mean" else 1.0

    def _own_loss(self, value: Any) -> float:
        return self._share * float(torch.as_tensor(value).detach())

    def gradient(self) -> Tensor:
        """The gradient of the batch with its regularization, flat; of several ranks, the part that is this one's."""
        parts = [[_or_zero(p) for p in layer.parameters] for layer in self.layers]
        g = flat(self.layers, parts)
        if self.team is not None:
            g = self._share * g
        return g + self.l2 / (1 if self.team is None else self.team.size) * self.parameters() if self.l2 else g

    def parameters(self) -> Tensor:
        """theta, flat."""
        return flat(self.layers, [[p.detach() for p in layer.parameters] for layer in self.layers])

    def quadratic(self, directions: list[Tensor], g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """b_i = g.d_i and Q_ij = d_i.(F + damping + l2)d_j, float64, F that of the batch."""
        V = torch.stack(directions)
        F = FisherMatrix(self.network, self.layers, self.likelihood, self.inputs)
        b, Q = (V @ g).double().cpu(), F.gram(directions)
        if self.team is not None:
            whole = self.team.allreduce(torch.cat([b[:, None], self._share * Q], 1).numpy())
            b, Q = torch.from_numpy(whole[:, 0].copy()), torch.from_numpy(whole[:, 1:].copy())
        return b, Q + (damping + self.l2) * (V @ V.T).double().cpu()

    @torch.no_grad()
    def move(self, step: Tensor, decay: bool = True) -> None:
        """theta += step; weights decay first."""
        for layer, parts in zip(self.layers, by_layer(self.layers, step)):
            for p, part in zip(layer.parameters, parts):
                if decay and self.decay and p.dim() > 1:
                    p.mul_(1.0 - self.decay)
                p.add_(part)

    def _before(self, closure: Callable[[], Any]) -> Before:
        """The batch at theta - `last`."""
        assert self.last is not None
        with self._moved(-self.last):
            loss = self._loss(closure)
            g = self.gradient()
            b, Q = self.quadratic([self.last], g, 0.0)
        return Before(loss, g, float(b[0]), float(Q[0, 0]))

    def _value(self, closure: Callable[[], Any], shift: Tensor) -> float:
        with self._moved(shift):
            return self._loss(closure)

    def _loss(self, closure: Callable[[], Any]) -> float:
        """The loss and its regularization; what the closure clears stays."""
        inputs, targets = self.inputs, self.targets
        with torch.enable_grad():
            loss = self.over_ranks(self._own_loss(closure()))
        self.inputs, self.targets = inputs, targets
        return loss + self.l2 * _half_square(self.parameters())

    @contextmanager
    def _moved(self, shift: Tensor) -> Iterator[None]:
        """Inside, the parameters are theta + shift; then they, gradients and buffers are as they were."""
        parameters = [p for layer in self.layers for p in layer.parameters]
        kept = [(p, p.detach().clone(), p.grad) for p in parameters]
        buffers = [(each, each.clone()) for each in self.network.buffers()]
        for p in parameters:
            p.grad = None
        try:
            self.move(shift, decay=False)
            yield
        finally:
            with torch.no_grad():
                for p, old, grad in kept:
                    p.copy_(old)
                    p.grad = grad
                for each, old in buffers:
                    each.copy_(old)

    def watch(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Keep what the network is called with."""
        if self._watching and module is self.network and module.training and torch.is_grad_enabled():
            self.inputs.append(arguments)

    def _forget(self) -> None:
        self.inputs, self.targets = [], []
        self.likelihood.seen.clear()

    def memory(self) -> dict[str, Any]:
        """What `recall` takes: tensors and numbers by name."""
        return {"steps": self.steps, "random": self.generator.get_state()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave, to the last bit."""
        self.steps = int(memory["steps"])
        self.generator.set_state(memory["random"])

    def state_dict(self) -> dict[str, Any]:
        """As that of PyTorch's optimizers; `memory` is in it."""
        return {**super().state_dict(), "memory": self.memory()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Go on from a `state_dict`."""
        state = dict(state_dict)
        self.recall(state.pop("memory"))
        super().load_state_dict(state)


def chosen(kind: type[S], settings: S | None, words: dict[str, Any]) -> S:
    """The settings, or those of the keywords, checked."""
    if settings is not None and words:
        raise InputError(kind.__name__, f"settings and {', '.join(words)}", "one of the two")
    found = settings or kind(**words)
    check(found)
    return found


def _half_square(theta: Tensor) -> float:
    return 0.5 * float(theta.double().square().sum())


class _Watcher:
    """The hook of a network that tells its optimizer; copies of the network have none."""

    def __init__(self, optimizer: Callable[[], SecondOrder | None]) -> None:
        self.optimizer = optimizer

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if (optimizer := self.optimizer()) is not None:
            optimizer.watch(module, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Watcher, (_nobody,)


def _nobody() -> None:
    return None


def _or_zero(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad.detach()
