"""The Jacobian of steps that are spread over ranks: blocks of owned rows, products with messages."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from pdeopt.control.stepjacobian import Curvature, SparseStepJacobian, StepCurvature
from pdeopt.space.layouts.layout import Layout
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import ParameterPattern
from pdeopt.steps.timegrid import Steps


class SpaceEquation(Protocol):
    """What a `LocalEquation` is of; every `SpaceConstraint` is one."""

    layout: Layout
    controls: Layout

    @property
    def parameter_pattern(self) -> ParameterPattern | None:
        """Where derivatives of the rows of this rank in p have entries."""

    def local_residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """The owned rows of F from owned unknowns and ghosts; see `SpaceConstraint`."""


class LocalEquation:
    """The rows of a residual that a rank owns as a function of what it sees: an equation without messages.

    Args:
        constraint: whose `local_residual` it is.
    """

    def __init__(self, constraint: SpaceEquation) -> None:
        self.constraint, self.state_dim = constraint, constraint.layout.n_owned
        self.residual = constraint.local_residual

    @property
    def parameter_pattern(self) -> ParameterPattern | None:
        """Where derivatives of these rows in p have entries."""
        return self.constraint.parameter_pattern


class SpaceStepJacobian(SparseStepJacobian):
    """F' = [B A C] of owned rows. Its point is that with ghosts; directions and cotangents are those of owned unknowns.

    Blocks know the layout of their columns, so that products bring or collect ghosts. Every verb is collective over the
    ranks of a step.
    """

    constraint: LocalEquation

    def hvp(
        self,
        lam: Tensor,
        d_old: Tensor | None = None,
        d_new: Tensor | None = None,
        dz: Tensor | None = None,
        dp: Tensor | None = None,
    ) -> Curvature:
        whole = self.constraint.constraint
        layout, controls = whole.layout, whole.controls
        old, new = (None if d is None else layout.extend(d) for d in (d_old, d_new))
        h_old, h_new, h_z, h_p = super().hvp(lam, old, new, None if dz is None else controls.extend(dz), dp)
        assert h_old is not None and h_new is not None and h_z is not None
        return layout.collect(h_old), layout.collect(h_new), controls.collect(h_z), h_p


class AffineStepJacobian(SparseStepJacobian):
    """F' = [B A C] of an affine equation without parameters, of whole steps or of owned rows: no curvature, and as its
    blocks do not ask where, its point is that of owned unknowns; no ghosts are brought or kept."""

    def hvp(
        self,
        lam: Tensor,
        d_old: Tensor | None = None,
        d_new: Tensor | None = None,
        dz: Tensor | None = None,
        dp: Tensor | None = None,
    ) -> Curvature:
        return None, None, None, None

    def curvature(self, lam: Tensor) -> StepCurvature:
        return NoCurvature(self, lam)


class NoCurvature(StepCurvature):
    """The second derivatives of an affine equation: zeros, wherever the pattern has entries."""

    @cached_property
    def W(self) -> StepMatrix:
        return StepMatrix(self.pattern.W, torch.zeros(1, self.pattern.W.nnz, dtype=torch.float64))
