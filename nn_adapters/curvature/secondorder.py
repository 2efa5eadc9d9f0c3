"""The base of optimizers that ask more of a network than its gradient."""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nn_adapters.curvature.curvednetwork import CurvedNetwork
from nn_adapters.curvature.likelihoods import Likelihood
from pdeopt.core.errors import InputError, SolveFailure, together
from pdeopt.core.monitor import logged
from pdeopt.core.settings import Settings, check
from pdeopt.core.team import Team

S, T = TypeVar("S", bound=Settings), TypeVar("T")


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
        network, likelihood, seed, team: see `KFAC`.
        l2: weight of |theta|^2 / 2, which the closure does not have.
        decay: share of the weights that a step takes away.

    Attributes:
        model: the network as a function of a flat vector.
        steps: so far.
        last: the last step, flat.
        damping: of the model, now.
        course: factor of a learning rate, where there is one: for schedules.

    Raises:
        InputError: what `CurvedNetwork` refuses.
    """

    last: Tensor | None
    damping: float
    course: float = 1.0

    def __init__(
        self, network: nn.Module, likelihood: Likelihood, l2: float, decay: float, seed: int, team: Team | None = None
    ) -> None:
        self.model = CurvedNetwork(network, likelihood, l2, team)
        self.decay, self.generator = decay, torch.Generator().manual_seed(seed)
        self.steps, self._watching = 0, True
        self._closure: Callable[[], Any] | None = None
        super().__init__([p for p in network.parameters() if p.requires_grad], {})
        self._forget()
        network.register_forward_pre_hook(_Watcher(weakref.ref(self)))

    @abstractmethod
    def advance(self, loss: float, g: Tensor) -> Tensor:
        """The step from here, flat.

        Args:
            loss: of the batch, with its regularization; NaN where it is not known.
            g: its gradient, (size,); of a team, the part of this rank.
        """

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
        value, model = None, self.model
        if closure is not None:
            self._forget()
            value = _evaluated(closure)
        model.targets = list(model.likelihood.seen or [])
        if not model.inputs:
            raise InputError(f"{type(self).__name__}.step", "no inputs", "a network in training mode, called before")
        model.weigh()
        loss, g = math.nan if value is None else model.loss(value), model.gradient()
        if not model.is_finite(g) or (value is not None and not math.isfinite(loss)):
            raise SolveFailure(f"a loss of {loss}, or its gradient, is not finite", "smaller steps, or other samples")
        self._watching, self._closure = False, closure  # what follows calls the network for its derivatives
        try:
            step = self.advance(loss, g)
        finally:
            self._watching, self._closure = True, None
        model.move(step, self.decay)
        self._forget()
        self.steps += 1
        return value

    @property
    def can_try(self) -> bool:
        """Whether the loss is known at other parameters, inside of `advance`."""
        return self._closure is not None

    def value(self, shift: Tensor) -> float:
        """The loss of the batch at theta + shift, inside of `advance`. Collective."""
        with self.model.moved(shift):
            return self._again()

    def before(self, most: int = 0) -> Before:
        """The batch before the last step; curvature of at most so many samples. Inside of `advance`. Collective."""
        assert self.last is not None
        with self.model.moved(-self.last):
            loss, g = self._again(), self.model.gradient()
            b, Q = self.model.quadratic([self.last], g, 0.0, most)
        return Before(loss, g, float(b[0]), float(Q[0, 0]))

    def together(self, function: Callable[[], T]) -> T:
        """The value of a function, or the failure of one rank on all of a team."""
        return function() if self.model.team is None else together(self.model.team, function)

    def _again(self) -> float:
        """The closure at other parameters; the batch that it clears stays."""
        assert self._closure is not None
        inputs, targets = self.model.inputs, self.model.targets
        value = _evaluated(self._closure)
        self.model.inputs, self.model.targets = inputs, targets
        return self.model.loss(value)

    def watch(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Keep what the network is called with."""
        if self._watching and module is self.model.network and module.training and torch.is_grad_enabled():
            self.model.inputs.append(arguments)

    def _forget(self) -> None:
        self.model.inputs, self.model.targets = [], []
        self.model.likelihood.seen = []

    def memory(self) -> dict[str, Any]:
        """What `recall` takes: tensors and numbers by name, those of this rank."""
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


@logged("pdeoptNetGradient")
def _evaluated(closure: Callable[[], Any]) -> Any:
    """What a closure returns; its gradients are there then."""
    with torch.enable_grad():
        return closure()


def chosen(kind: type[S], settings: S | None, words: dict[str, Any]) -> S:
    """The settings, or those of the keywords, checked."""
    if settings is not None and words:
        raise InputError(kind.__name__, f"settings and {', '.join(words)}", "one of the two")
    found = settings or kind(**words)
    check(found)
    return found


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
