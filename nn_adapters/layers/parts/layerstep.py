"""Steps of a network, many at once, and their derivatives: by autograd, or by hand.

    u_i = step(u_{i-1}, z_i; p):   controls z_i, one row a step, and parameters p that all steps share

The solver, `layer_mgrit`, asks for states after steps, `advance`, and for cotangents before them, `pullback`; where it
goes through the finest steps for the last time, for the gradients by controls and shared parameters, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

#: Length of steps: a number, or one a row, (rows,).
StepLength = float | Tensor


class LayerStep(Protocol):
    """What a step of the chain is, and how it is differentiated; many steps at once, rows do not interact.

    Args:
        u: states before the steps, (rows, ...).
        controls: those of the steps, (rows, ...) each.
        shared: parameters that serve all steps.
        dt: length of the steps.

    Returns:
        The states after the steps, (rows, ...).

    `AutogradStep(function)` makes one of any function of torch; `DenseStep` has its derivatives by hand.

    Attributes:
        axis: of the features in a state, from the end.
    """

    @property
    def axis(self) -> int:
        """See above."""

    def __call__(self, u: Tensor, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: StepLength) -> Tensor:
        """The states after the steps."""

    def linearize(
        self, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: Callable[[slice], StepLength]
    ) -> LayerSteps:
        """Steps with these controls, ready for derivatives."""

    def over_intervals(self, shortest: float) -> CoarseStep:
        """What takes the place of an interval of steps of length `shortest` on coarse levels."""


class CoarseStep(Protocol):
    """A long step, differentiated by the state alone; arguments as those of `LayerStep`.

    Attributes:
        takes_means: whether its controls may be the means of those in its interval, rather than those in the middle.
    """

    @property
    def takes_means(self) -> bool:
        """See above."""

    def __call__(self, u: Tensor, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: StepLength) -> Tensor:
        """The states after the steps."""

    def linearize(
        self, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: Callable[[slice], StepLength]
    ) -> LinearizedSteps:
        """Steps with these controls, ready for derivatives."""


class LinearizedSteps(ABC):
    """The steps of one level at their states. Rows that are asked for together are differentiated together.

    On the finest level `remember` says where each step is evaluated; on coarse ones `states` does, before the adjoint.

    Args:
        step: of the level.
        controls: of all steps of this rank on this level, (steps, ...) each.
        shared: parameters that serve all steps.
        dt: rows -> length of these steps.

    Attributes:
        states: before each step, (steps, ...), on coarse levels.
        pieces: what is remembered, by the rows.
    """

    def __init__(
        self, step: CoarseStep, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: Callable[[slice], StepLength]
    ) -> None:
        self.step, self.controls, self.shared, self.dt = step, controls, shared, dt
        self.states: Tensor | None = None
        self.pieces: dict[tuple[Any, Any, Any], Any] = {}

    def advance(self, u: Tensor, rows: slice) -> Tensor:
        """The states after these steps, (rows, ...)."""
        return self.step(u, [z[rows] for z in self.controls], self.shared, self.dt(rows))

    @abstractmethod
    def remember(self, u: Tensor, rows: slice) -> Tensor:
        """As `advance`, and be ready for derivatives there."""

    @abstractmethod
    def pullback(self, w: Tensor, rows: slice) -> Tensor:
        """The cotangents of the states before these steps from those of the states after them, (rows, ...)."""


class Intervals(Protocol):
    """Whole intervals of m steps at once, all of a rank's: states where they begin to those where they end."""

    def advance(self, starts: Tensor, m: int) -> Tensor:
        """The states at the ends, (intervals, ...)."""

    def remember(self, starts: Tensor, m: int) -> Tensor:
        """As `advance`, and be ready for derivatives there."""

    def pullback(self, w: Tensor, m: int) -> Tensor:
        """The cotangents of the states at the starts from those at the ends, (intervals, ...)."""

    def gradients(self, w: Tensor, m: int) -> tuple[Tensor, ...]:
        """As `pullback`, then the cotangents of the controls of all steps."""


class LayerSteps(LinearizedSteps):
    """The steps of the finest level.

    Attributes:
        intervals: what goes through whole intervals of them, where they share nothing; None where nothing does.
    """

    intervals: Intervals | None = None

    @abstractmethod
    def gradients(self, w: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """As `pullback`, then the cotangents of controls and shared parameters; what was remembered is freed.

        Those of shared parameters may be left to `kept_back`.
        """

    def kept_back(self) -> Sequence[Tensor]:
        """The cotangents of shared parameters that `gradients` has not given, of all steps together; none elsewhere."""
        return ()


@dataclass(frozen=True)
class AutogradStep:
    """A function of torch as a `LayerStep`, differentiated by autograd.

    Args:
        function: (u, controls, shared, dt) -> states after the steps; shapes as in `LayerStep`.
        over: (length of a layer, u, controls, shared, dt) -> states after steps in the place of intervals of layers;
            None where `function` knows long steps itself.
        takes_means: see `CoarseStep`.
        axis: of the features in a state, from the end.
    """

    function: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Any], Tensor]
    over: Callable[..., Tensor] | None = None
    takes_means: bool = True
    axis: int = -1

    def __call__(self, u: Tensor, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: StepLength) -> Tensor:
        return self.function(u, controls, shared, dt).to(u.dtype)  # operations under autocast may have another

    def linearize(
        self, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: Callable[[slice], StepLength]
    ) -> AutogradLinearized:
        return AutogradLinearized(self, controls, shared, dt)

    def over_intervals(self, shortest: float) -> AutogradStep:
        """The step of coarse levels."""
        return self if self.over is None else AutogradStep(partial(self.over, shortest), None, self.takes_means)


@dataclass
class _Evaluated:
    """Where steps were evaluated, for the derivatives there: leaves of autograd and the value."""

    leaves: list[Tensor]
    value: Tensor


class AutogradLinearized(LayerSteps):
    """Steps that autograd differentiates; a piece is a graph."""

    def remember(self, u: Tensor, rows: slice) -> Tensor:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (u, *(z[rows] for z in self.controls), *self.shared)]
            count = len(self.controls)
            value = self.step(leaves[0], leaves[1 : 1 + count], leaves[1 + count :], self.dt(rows))
            if not value.requires_grad:  # a block that uses none of them
                value = value + 0.0 * leaves[0]
        self.pieces[rows.start, rows.stop, rows.step] = _Evaluated(leaves, value)
        return value.detach()

    def pullback(self, w: Tensor, rows: slice) -> Tensor:
        piece = self._piece(rows)
        return torch.autograd.grad(piece.value, piece.leaves[0], w, retain_graph=True, materialize_grads=True)[0]

    def gradients(self, w: Tensor, rows: slice) -> tuple[Tensor, ...]:
        piece = self._piece(rows)
        del self.pieces[rows.start, rows.stop, rows.step]
        found = torch.autograd.grad(piece.value, piece.leaves, w, allow_unused=True)
        return tuple(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, piece.leaves))

    def _piece(self, rows: slice) -> _Evaluated:
        key = rows.start, rows.stop, rows.step
        if key not in self.pieces:
            assert self.states is not None
            self.remember(self.states[rows], rows)
        return self.pieces[key]  # type: ignore[no-any-return]
