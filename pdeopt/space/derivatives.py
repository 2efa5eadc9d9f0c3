"""The derivatives of a step's weak form by UFL: F, its blocks A, B, C and F_p, and those of second order."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from pdeopt.core.arrays import Array
from pdeopt.space.fenicsx import packages, with_degrees
from pdeopt.space.stepforms import BlockForm, StepForm, evaluate
from pdeopt.space.steppoint import POINT, Field, StepPoint
from pdeopt.steps.sparse import StepPattern
from pdeopt.steps.sparsity import ParameterPattern, Sparsity

#: Times and directions at random, where the columns of C tell which coefficients of z are controls.
SAMPLE_LENGTH, SAMPLE_TIME = 0.1, 0.37


class FormDerivatives:
    """F(u_old, u_new, z; p) of a step and its derivatives, compiled when they are first asked for.

    Args:
        F: residual of a step, linear in its test function.
        point: what F depends on; the unknowns of z are chosen here: those that F depends on.

    Attributes:
        residual: F applied to the basis functions.
        A, B, C: by u_new, u_old and z; C is None without a control.
        is_affine: whether F is affine in u_old, u_new and z.
    """

    def __init__(self, F: Any, point: StepPoint) -> None:
        F = with_degrees(F)
        self._F, self.point = F, point
        self.residual = StepForm(F, point, point.new)
        self.A, self.B = self._first(point.new), self._first(point.old)
        if point.z is not None:
            point.z.choose(self._controls(point.z))
        self.C = None if point.z is None else self._first(point.z)
        self.is_affine = not any(form.depends & POINT for form in self.jacobian)

    @property
    def jacobian(self) -> list[StepForm]:
        """A and B, and C where there is a control."""
        return [form for form in (self.A, self.B, self.C) if form is not None]

    @cached_property
    def has_curvature(self) -> bool:
        """Whether the Hessian of lam.F has entries, on any of the ranks that share the mesh. Collective."""
        return not self.point.new.layout.all(not self.W.sparsity.nnz)

    def depends_on(self, field: Field) -> bool:
        """Whether F has the function of a field."""
        return any(coefficient is field.function for coefficient in self._F.coefficients())

    def _first(self, field: Field) -> StepForm:
        return StepForm(packages().ufl.derivative(self._F, field.function), self.point, self.point.new, field)

    def _controls(self, z: Field) -> Array:
        """Which owned coefficients of z have a nonzero column of C at a random point: on a boundary, say, few."""
        generator, ufl, layout = np.random.default_rng(0), packages().ufl, z.layout
        slope = ufl.derivative(self._F, z.function)
        form = StepForm(slope, self.point, self.point.new, z, whole=False)
        seen = torch.zeros(1, layout.n_all, dtype=torch.float64)
        if form.is_zero:
            return np.zeros(layout.n_owned, dtype=bool)
        for field in (self.point.old, self.point.new, z, *self.point.p):
            field.set(generator.uniform(0.5, 1.5, len(field)))
        self.point.set_time(SAMPLE_TIME - SAMPLE_LENGTH, SAMPLE_TIME, SAMPLE_LENGTH)
        np.maximum.at(seen[0].numpy(), form.sparsity.cols, np.abs(form.own_values()))
        found = layout.collect(seen)[0]
        largest = layout.max(found.amax().reshape(1) if len(found) else found.new_zeros(1))
        is_unknown = np.zeros(layout.n_owned, dtype=bool)
        is_unknown[z.owned] = (found > 1e-14 * largest).numpy()
        return is_unknown

    @property
    def dims(self) -> tuple[int, int, int]:
        """n and m, ghosts counted, and the number of parameters."""
        at = self.point
        return at.new.layout.n_all, at.controls.n_all, sum(len(field) for field in at.p)

    @cached_property
    def F_p(self) -> BlockForm:
        """dF/dp, (n, P)."""
        n, P = self.point.new.layout.n_owned, self.dims[2]
        return BlockForm((n, P), [(self._first(f), 0, start) for f, start in self._parameters()])

    @cached_property
    def W(self) -> BlockForm:
        """The Hessian of what this rank has of lam.F, over [u_old | u_new | z] with ghosts."""
        n, m, _ = self.dims
        return self._second((2 * n + m, 2 * n + m), _variables(self.point), _variables(self.point))

    @cached_property
    def W_p(self) -> BlockForm:
        """Its mixed second derivatives, rows over [u_old | u_new | z], columns over p."""
        n, m, P = self.dims
        return self._second((2 * n + m, P), _variables(self.point), self._parameters())

    @cached_property
    def W_pp(self) -> BlockForm:
        """Its second derivatives in p."""
        P = self.dims[2]
        return self._second((P, P), self._parameters(), self._parameters())

    def _parameters(self) -> list[tuple[Field, int]]:
        starts = np.cumsum([0, *(len(field) for field in self.point.p)])
        return [(field, int(start)) for field, start in zip(self.point.p, starts)]

    def _second(
        self, shape: tuple[int, int], rows: list[tuple[Field, int]], columns: list[tuple[Field, int]]
    ) -> BlockForm:
        """Blocks of the Hessian of F(lam); of a square one the upper triangle, whose mirror image is the rest."""
        ufl = packages().ufl
        test, is_square = self._F.arguments()[0], rows == columns
        weighted = ufl.replace(self._F, {test: self.point.lam.function})
        blocks = []
        for field, row in rows:
            slope = packages().expand(ufl.derivative(weighted, field.function))
            if slope.empty():
                continue
            for other, column in columns:
                if not is_square or column >= row:
                    form = StepForm(ufl.derivative(slope, other.function), self.point, field, other, whole=False)
                    blocks.append((form, row, column))
        return BlockForm(shape, blocks, mirrored=is_square)

    def pattern(self) -> StepPattern:
        """Of a step."""
        C = Sparsity.empty(self.point.new.layout.n_owned, 0) if self.C is None else self.C.sparsity
        return StepPattern(self.A.sparsity, self.B.sparsity, C, self.W.sparsity)

    def parameter_pattern(self) -> ParameterPattern:
        """Of what p has in a step."""
        return ParameterPattern(self.F_p.sparsity, self.W_p.sparsity, self.W_pp.sparsity)


def block_values(block: BlockForm, *where: Any) -> Any:
    """The entries of a block at steps, `where` as `evaluate` has it."""
    return block.values(evaluate(block.forms, *where))


def _variables(point: StepPoint) -> list[tuple[Field, int]]:
    """u_old, u_new and z, and where they begin in a row of all."""
    n = point.new.layout.n_all
    return [(point.old, 0), (point.new, n)] + ([] if point.z is None else [(point.z, 2 * n)])
