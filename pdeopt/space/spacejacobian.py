"""The Jacobian of steps that are spread over ranks: blocks of owned rows, products with messages."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pdeopt.control.stepjacobian import Curvature, SparseStepJacobian
from pdeopt.space.layouts.layout import Layout
from pdeopt.steps.sparsity import ParameterPattern
from pdeopt.steps.timegrid import Steps


class SpaceEquation(Protocol):
    """What a `LocalEquation` is of; every `SpaceConstraint` is one."""

    layout: Layout
    controls: Layout
    is_affine: bool

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
        if whole.is_affine and not self.point[3].numel():
            return None, None, None, None
        layout, controls = whole.layout, whole.controls
        old, new = (None if d is None else layout.extend(d) for d in (d_old, d_new))
        h_old, h_new, h_z, h_p = super().hvp(lam, old, new, None if dz is None else controls.extend(dz), dp)
        assert h_old is not None and h_new is not None and h_z is not None
        return layout.collect(h_old), layout.collect(h_new), controls.collect(h_z), h_p
