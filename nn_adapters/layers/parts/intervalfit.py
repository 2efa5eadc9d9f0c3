"""Long steps fitted to what intervals of layers did in earlier batches: their first layer, and a map for the others.

The last run through the intervals tells for nothing where each begins, u, where its first layer leads, v, and where it
ends, e. The long step of an interval is

    C(u) = v + b + B (u, v - u),

one evaluation of a layer, with its weights of today, and an affine map of features, the same for all samples, tokens,
pixels: that of the least squares |e - C(u)|^2 over the batches so far, of which earlier ones count less and less. A
long step of residual layers (`coarsening`) takes one layer for all of an interval, which those of trained transformers,
each of length 1, are too unlike for. Weights change little from batch to batch, and so do the maps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.layers.parts.context import autocast_state

#: By how much a batch counts less with each batch that follows.
FADE = 0.6

#: Added to the squares on the diagonal, relative to them. The map that nothing is known of is zero.
RIDGE = 1e-4

#: (rows of states, the steps that take them on) -> rows of states.
Map = Callable[[Tensor, slice], Tensor]


def feature_axis(block: nn.Module) -> int:
    """The axis of the features in states of a block, from the end: that of channels for convolutions, else the last.

    Args:
        block: of a layer.
    """
    dims = [part.weight.dim() - 1 for part in block.modules() if isinstance(part, nn.modules.conv._ConvNd)]
    return -dims[0] if dims else -1


@dataclass(frozen=True)
class IntervalFit:
    """The maps of the intervals of this rank, and the sums that they come from, in double precision.

    With d features, a sample is the row (1, u, v - u) of 2 d + 1 numbers.

    Attributes:
        squares: sums of products of these numbers, (intervals, 2 d + 1, 2 d + 1); None before the first batch.
        targets: sums of their products with e - v, (intervals, 2 d + 1, d).
    """

    squares: Tensor | None = None
    targets: Tensor | None = None

    def is_ready(self, u: Tensor, axis: int) -> bool:
        """Whether there are maps for states like u."""
        return self.targets is not None and self.targets.shape[-1] == u.shape[axis]

    def learned(self, states: tuple[Tensor, Tensor, Tensor], axis: int) -> IntervalFit:
        """The fit with one more batch. An interval whose sums would not be finite learns nothing from it.

        Args:
            states: u, v and e of each interval, (intervals, ...).
            axis: of the features.
        """
        with torch.autocast(**autocast_state(states[0].device.type) | {"enabled": False}):
            dtype = torch.promote_types(states[0].dtype, torch.float32)
            u, v, e = (_rows(state, axis).to(dtype) for state in states)
            row = torch.cat([torch.ones_like(u[..., :1]), u, v - u], -1)
            double = torch.promote_types(dtype, torch.float64)  # complex numbers stay complex
            sums = [torch.bmm(row.mH, right).to(double) for right in (row, e - v)]
        is_finite = torch.stack([each.flatten(1).isfinite().all(1) for each in sums]).all(0)[:, None, None]
        squares, targets = (torch.where(is_finite, each, torch.zeros_like(each)) for each in sums)
        if self.squares is None or self.targets is None or self.squares.shape != squares.shape:
            return IntervalFit(squares, targets)
        earlier = self.squares.to(squares), self.targets.to(targets)
        faded = [torch.where(is_finite, FADE * each, each) for each in earlier]
        return IntervalFit(squares + faded[0], targets + faded[1])

    @cached_property
    def maps(self) -> Tensor:
        """b and B, (intervals, 2 d + 1, d)."""
        assert self.squares is not None and self.targets is not None
        sizes = self.squares.diagonal(dim1=1, dim2=2).abs()
        ridge = RIDGE * sizes + 1e-12 * sizes.amax(1, keepdim=True).clamp(min=1e-30)
        return torch.linalg.solve_ex(self.squares + torch.diag_embed(ridge), self.targets)[0]

    def add(self, v: Tensor, u: Tensor, rows: slice, axis: int) -> Tensor:
        """v + b + B (u, v - u) for these intervals.

        Args:
            v, u: states after the first layer and before it, (rows, ...).
            rows: the intervals.
            axis: of the features.
        """
        b, of_u, of_change = self._parts(u, rows)
        u_rows = _rows(u, axis)
        more = torch.baddbmm(b, u_rows, of_u) + torch.bmm(_rows(v, axis) - u_rows, of_change)
        return v + _like(more, v, axis)

    def back(self, w: Tensor, rows: slice, axis: int) -> tuple[Tensor, Tensor]:
        """The cotangents of v and u, from that of C(u); arguments as those of `add`."""
        _, of_u, of_change = self._parts(w, rows)
        w_rows = _rows(w, axis)
        through = torch.bmm(w_rows, of_change.mH)
        return w + _like(through, w, axis), _like(torch.bmm(w_rows, of_u.mH) - through, w, axis)

    def _parts(self, u: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        d = self.maps.shape[-1]
        b, of_u, of_change = self.maps[rows].to(u).split([1, d, d], 1)
        return b, of_u, of_change


class FittedSteps:
    """Fitted long steps as the steps of a coarse level, see `LinearizedSteps`.

    Args:
        first: the first layer of each interval.
        fit: of the same intervals.
        axis: of the features.

    Attributes:
        states: before each step, (steps, ...), set before the adjoint.
    """

    def __init__(self, first: Any, fit: IntervalFit, axis: int) -> None:
        self.first, self.fit, self.axis = first, fit, axis
        self.states: Tensor | None = None

    def advance(self, u: Tensor, rows: slice) -> Tensor:
        """The states after these steps, (rows, ...)."""
        return self.fit.add(self.first.advance(u, rows), u, rows, self.axis)

    def pullback(self, w: Tensor, rows: slice) -> Tensor:
        """The cotangents of the states before these steps from those of the states after them, (rows, ...)."""
        assert self.states is not None
        if (rows.start, rows.stop, rows.step) not in self.first.pieces:
            self.first.remember(self.states[rows], rows)
        w, rest = self.fit.back(w, rows, self.axis)
        before: Tensor = self.first.pullback(w, rows) + rest
        return before


class Watch:
    """Keeps, of a run through the intervals, the states where each begins and those after its first layer.

    All intervals go at once, or one layer goes after the other.

    Args:
        factor: layers of an interval.
    """

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.seen: list[tuple[Tensor, Tensor]] = []

    def over(self, step: Map) -> Map:
        """The same steps, watched."""
        return partial(self._step, step)

    def _step(self, step: Map, u: Tensor, rows: slice) -> Tensor:
        v = step(u, rows)
        if rows.start % self.factor == 0:
            self.seen.append((u, v))
        return v

    def states(self, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, v and e of each interval, (intervals, ...).

        Args:
            ends: e; of layers that went one after the other the last alone, (1, ...).
        """
        starts, firsts = (torch.cat(parts) for parts in zip(*self.seen))
        return starts, firsts, torch.cat([starts[1:], ends])[-len(starts) :]


def _rows(state: Tensor, axis: int) -> Tensor:
    """(intervals, samples, features) of states (intervals, ...)."""
    moved = state.movedim(axis, -1)
    return moved.reshape(len(state), -1, moved.shape[-1])


def _like(rows: Tensor, state: Tensor, axis: int) -> Tensor:
    """The way back, in the state's shape and type."""
    return rows.reshape(state.movedim(axis, -1).shape).movedim(-1, axis).to(state.dtype)
