"""The step Jacobian of a weak form: sparse blocks that UFL differentiates and DOLFINx assembles."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from pdeopt.control.stepjacobian import Curvature, SparseStepJacobian, StepCurvature
from pdeopt.core.autodiff import is_transformed
from pdeopt.space.derivatives import FormDerivatives, block_values
from pdeopt.space.layouts.layout import Layout
from pdeopt.steps.sparse import StepMatrix


class FormJacobian(SparseStepJacobian):
    """F' = [B A C] and dF/dp of a weak form at a batch of steps; second derivatives are assembled, too.

    Where ranks share the mesh, its point has ghosts; directions and cotangents are those of owned unknowns. Every verb
    is collective over the ranks of a step.

    Attributes:
        derivatives: the compiled forms; set by `FormConstraint.linearize`.
    """

    derivatives: FormDerivatives

    @cached_property
    def layouts(self) -> tuple[Layout, Layout]:
        """Of states and of controls."""
        at = self.derivatives.point
        return at.new.layout, at.controls

    @cached_property
    def residual(self) -> Tensor:
        """F at the point, (batch, n)."""
        (u_old, u_new, z, _), (layout, controls) = self.point, self.layouts
        own = u_old[:, : layout.n_owned], u_new[:, : layout.n_owned], z[:, : controls.n_owned]
        return self.constraint.residual(*own, self.steps)

    @cached_property
    def F_p(self) -> StepMatrix:
        """dF/dp of each step."""
        u_old, u_new, z, _ = self.point
        block = self.derivatives.F_p
        return StepMatrix(block.sparsity, block_values(block, (u_old, u_new, z), self.steps))

    def _parameters(self) -> StepMatrix:
        return self.F_p

    def curvature(self, lam: Tensor) -> FormCurvature:
        lam = self.layouts[0].extend(lam)
        if not isinstance(self._curvature, FormCurvature) or not torch.equal(self._curvature.lam, lam):
            self._curvature = FormCurvature(self, lam.clone())
        return self._curvature

    def hvp(
        self,
        lam: Tensor,
        d_old: Tensor | None = None,
        d_new: Tensor | None = None,
        dz: Tensor | None = None,
        dp: Tensor | None = None,
    ) -> Curvature:
        layout, controls = self.layouts
        if not self.derivatives.has_curvature and not len(self.point[3]):
            return None, None, None, None
        old, new = (None if d is None else layout.extend(d) for d in (d_old, d_new))
        directions = self._directions(old, new, None if dz is None else controls.extend(dz), dp)
        found = (self._curvature if is_transformed() and self._curvature else self.curvature(lam)).product(*directions)
        assert found is not None  # the entries of forms are all known
        h_old, h_new, h_z, h_p = found
        return layout.collect(h_old), layout.collect(h_new), controls.collect(h_z), h_p


class FormCurvature(StepCurvature):
    """The Hessian of each lam_i.F_i by assembled second derivatives, made when asked for.

    Args:
        jacobian: at the point.
        lam: multipliers of the steps with ghosts, (batch, n).
    """

    def __init__(self, jacobian: FormJacobian, lam: Tensor) -> None:
        super().__init__(jacobian, lam)
        self._derivatives, self._steps = jacobian.derivatives, jacobian.steps

    def _entries(self, name: str) -> StepMatrix:
        block, (u_old, u_new, z, _) = getattr(self._derivatives, name), self.point
        values = block_values(block, (u_old, u_new, z), self._steps, self.lam)
        return StepMatrix(block.sparsity, values if len(values) > 1 else values.expand(len(self.lam), -1))

    @cached_property
    def W(self) -> StepMatrix:
        """Over [u_old | u_new | z]."""
        return self._entries("W")

    @cached_property
    def in_parameters(self) -> tuple[StepMatrix, StepMatrix]:
        """The columns of p: rows over [u_old | u_new | z] of each step, and the sum over the batch in p alone."""
        own = self._entries("W_pp")
        return self._entries("W_p"), StepMatrix(own.sparsity, own.values.sum(0, keepdim=True))
