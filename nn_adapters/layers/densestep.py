"""The step u + dt act(W u + b) of many layers at once, with its derivatives by hand.

In a narrow network calls cost more than arithmetic: here a step takes three, its adjoint two. States have the shape
(layers, width, batch), samples last: products of small matrices with long rows are five times as fast as the other way
round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nn_adapters.layers.layerstep import LinearizedSteps, StepLength

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
    """

    def __init__(self, block: nn.Sequential) -> None:
        self.act, self.backward = DENSE_ACTIVATIONS[type(block[1])]

    def __call__(self, u: Tensor, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: StepLength) -> Tensor:
        return add_scaled(u, self.value(u, controls), dt)

    def value(self, u: Tensor, controls: Sequence[Tensor]) -> Tensor:
        """act(W u + b)."""
        W, b = controls
        return self.act(torch.baddbmm(b[:, :, None], W, u))

    def linearize(
        self, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: Callable[[slice], StepLength]
    ) -> LinearizedSteps:
        return DenseLinearized(self, controls, shared, dt)


class DenseLinearized(LinearizedSteps):
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
        dt = dt if isinstance(dt, float) else _column(dt, 3).to(w)
        return self._back(w, s, rows), torch.bmm(s, u.mT) * dt, (s.sum(2, keepdim=True) * dt)[..., 0]

    def _back(self, w: Tensor, s: Tensor, rows: slice) -> Tensor:
        """w + dt W's."""
        W, dt = self.controls[0][rows], self.dt(rows)
        if isinstance(dt, float):
            return torch.baddbmm(w, W.mT, s, alpha=dt)
        return add_scaled(w, torch.bmm(W.mT, s), dt)

    def _piece(self, rows: slice) -> tuple[Tensor, Tensor]:
        key = rows.start, rows.stop, rows.step
        if key in self.pieces:
            return self.pieces[key]  # type: ignore[no-any-return]
        if (None, None, None) not in self.pieces:  # a coarse level: all its steps at once
            assert self.states is not None
            self.remember(self.states, slice(None))
        u, value = self.pieces[None, None, None]
        return u[rows], value[rows]


def add_scaled(u: Tensor, v: Tensor, dt: StepLength) -> Tensor:
    """u + dt v, dt a number or one a row.

    Args:
        u, v: (rows, ...).
        dt: a number, or (rows,).
    """
    if isinstance(dt, float):
        return torch.add(u, v, alpha=dt)
    return torch.addcmul(u, v, _column(dt, u.dim()).to(u))


def _column(dt: Tensor, dim: int) -> Tensor:
    return dt.reshape(-1, *[1] * (dim - 1))
