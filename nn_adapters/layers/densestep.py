"""The step u + dt act(W u + b) of many layers at once, with its derivatives by hand.

In a narrow network calls cost more than arithmetic: here a step takes three, its adjoint two. States have the shape
(layers, width, batch), samples last: products of small matrices with long rows are five times as fast as the other way
round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nn_adapters.layers.coarsening import add_scaled, column, half_way, two_stages
from nn_adapters.layers.parts.fusedchain import FusedIntervals
from nn_adapters.layers.parts.layerstep import LayerSteps, LinearizedSteps, StepLength

aten = torch.ops.aten

#: act in place, and act'(a) w from w and act(a), of activations whose derivative is a function of their value.
DENSE_ACTIVATIONS: dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    nn.ReLU: (torch.relu_, lambda w, v: aten.threshold_backward(w, v, 0.0)),
    nn.Tanh: (torch.tanh_, lambda w, v: aten.tanh_backward(w, v)),
    nn.Sigmoid: (torch.sigmoid_, lambda w, v: aten.sigmoid_backward(w, v)),
    nn.Identity: (lambda a: a, lambda w, v: w),
}


def is_dense(block: nn.Module) -> bool:
    """Whether the block is act(W u + b) with an activation that this module knows."""
    return (
        type(block) is nn.Sequential
        and len(block) == 2
        and type(block[0]) is nn.Linear
        and block[0].bias is not None
        and type(block[1]) in DENSE_ACTIVATIONS
        and not any(part._forward_hooks or part._forward_pre_hooks for part in block.modules())
    )


class DenseStep:
    """The layer u + dt act(W u + b) as a `LayerStep`: controls (W, b), nothing shared, derivatives by hand.

    Args:
        block: a block for which `is_dense` holds. States are (layers, width, batch), W (layers, width, width), b
            (layers, width).
        fused: name of the activation, where compiled loops go through whole intervals; empty where none do.
    """

    axis = -2  # of the features in a state

    def __init__(self, block: nn.Sequential, fused: str = "") -> None:
        self.fused = fused
        self.act, self.backward = DENSE_ACTIVATIONS[type(block[1])]

    def __call__(self, u: Tensor, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: StepLength) -> Tensor:
        return add_scaled(u, self.value(u, controls), dt)

    def value(self, u: Tensor, controls: Sequence[Tensor]) -> Tensor:
        """act(W u + b)."""
        W, b = controls
        return self.act(torch.baddbmm(b[:, :, None], W, u))

    def linearize(
        self, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: Callable[[slice], StepLength]
    ) -> LayerSteps:
        found = DenseLinearized(self, controls, shared, dt)
        if self.fused:
            found.intervals = FusedIntervals(self.fused, dt(slice(None)), *controls)
        return found

    def over_intervals(self, shortest: float) -> LongDenseStep:
        """The step of coarse levels."""
        return LongDenseStep(self, shortest)


@dataclass(frozen=True)
class LongDenseStep:
    """The step of two stages in the place of an interval of dense layers, with its derivative by hand.

    Args:
        layer: the step of a layer.
        shortest: its length.
    """

    layer: DenseStep
    shortest: float
    takes_means: bool = True

    def __call__(self, u: Tensor, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: StepLength) -> Tensor:
        return two_stages(self.layer.value, self.shortest, u, controls, dt)

    def linearize(
        self, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: Callable[[slice], StepLength]
    ) -> LinearizedSteps:
        return LongDenseLinearized(self, controls, shared, dt)


class LongDenseLinearized(LinearizedSteps):
    """Long dense steps at their states; a piece is act(W u + b) of both stages."""

    step: LongDenseStep

    def remember(self, u: Tensor, rows: slice) -> Tensor:
        theta, dt, value = [z[rows] for z in self.controls], self.dt(rows), self.step.layer.value
        first = value(u, theta)
        second = value(add_scaled(u, first, half_way(dt, self.step.shortest)), theta)
        self.pieces[rows.start, rows.stop, rows.step] = first, second
        return add_scaled(u, second, dt)

    def pullback(self, w: Tensor, rows: slice) -> Tensor:
        first, second = self._piece(rows)
        W, dt, back = self.controls[0][rows].mT, self.dt(rows), self.step.layer.backward
        inner = torch.bmm(W, back(w, second))
        inner = inner * (dt if isinstance(dt, float) else column(dt, 3).to(w))
        through = torch.bmm(W, back(inner, first))
        return add_scaled(w + inner, through, half_way(dt, self.step.shortest))

    def _piece(self, rows: slice) -> tuple[Tensor, Tensor]:
        if (None, None, None) not in self.pieces:
            assert self.states is not None
            self.remember(self.states, slice(None))
        first, second = self.pieces[None, None, None]
        return first[rows], second[rows]


class DenseLinearized(LayerSteps):
    """Dense steps with derivatives by hand; a piece is (u, act(W u + b))."""

    step: DenseStep

    def remember(self, u: Tensor, rows: slice) -> Tensor:
        value = self.step.value(u, [z[rows] for z in self.controls])
        self.pieces[rows.start, rows.stop, rows.step] = (u, value)
        return add_scaled(u, value, self.dt(rows))

    def pullback(self, w: Tensor, rows: slice) -> Tensor:
        _, value = self._piece(rows)
        return self._back(w, self.step.backward(w, value), rows)

    def gradients(self, w: Tensor, rows: slice) -> tuple[Tensor, ...]:
        u, value = self._piece(rows)
        self.pieces.pop((rows.start, rows.stop, rows.step), None)
        s, dt = self.step.backward(w, value), self.dt(rows)
        dt = dt if isinstance(dt, float) else column(dt, 3).to(w)
        return self._back(w, s, rows), torch.bmm(s, u.mT) * dt, (s.sum(2, keepdim=True) * dt)[..., 0]

    def _back(self, w: Tensor, s: Tensor, rows: slice) -> Tensor:
        """w + dt W's."""
        W, dt = self.controls[0][rows], self.dt(rows)
        if isinstance(dt, float):
            return torch.baddbmm(w, W.mT, s, alpha=dt)
        return add_scaled(w, torch.bmm(W.mT, s), dt)

    def _piece(self, rows: slice) -> tuple[Tensor, Tensor]:
        key = rows.start, rows.stop, rows.step
        return self.pieces[key]  # type: ignore[no-any-return]
