"""State equations whose steps are spread over ranks: the residual of the rows that a rank owns."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any

import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.control.constraint import TimeDependentConstraint, _Sample
from pdeopt.control.stepjacobian import SparseStepJacobian
from pdeopt.core.errors import InputError
from pdeopt.space.layouts.layout import Layout, extended
from pdeopt.space.spacejacobian import AffineStepJacobian, LocalEquation, SpaceStepJacobian
from pdeopt.steps.sparse import StepMatrix, StepPattern
from pdeopt.steps.sparsity import Sparsity, widened
from pdeopt.steps.timegrid import Steps


class SpaceConstraint(TimeDependentConstraint):
    """F_i(u_{i-1}, u_i, z_i; p) = 0 with the unknowns of a step spread over the ranks of `grid.space_comm`.

    A subclass makes layouts, gives them to `__init__`, and writes `local_residual`: that sees owned unknowns and ghosts
    of states and controls, and returns the owned rows. Derivatives are found rank by rank, without messages. On one
    rank a step is whole, and the same class serves any number of them.

    Args:
        layout: of the states.
        controls: that of the controls; default none is seen by another rank, and there are as many as owned states.
            `Layout.replicated` is that of a few controls for all.

    Attributes:
        layout, controls: the same.
        is_affine: F is affine in states and controls, with blocks that depend on the lengths of the steps alone: they
            are then found once, and have no curvature.

    Example:
        >>> class Decay(SpaceConstraint):                       # backward Euler for u' = -u^3 + z in each unknown
        ...     def local_residual(self, u_old, u_new, z, steps):
        ...         own = slice(0, self.layout.n_owned)
        ...         rate = z[:, own] - u_new[:, own] ** 3
        ...         return u_new[:, own] - u_old[:, own] - steps.dt[:, None] * rate
        ...
        ...     def initial_state(self, p):
        ...         return torch.ones(self.layout.n_owned, dtype=torch.float64)
    """

    is_affine: bool = False
    layout: Layout
    controls: Layout

    def __init__(self, layout: Layout, controls: Layout | None = None) -> None:
        for what, each in (("layout", layout), ("controls", controls)):
            if not (isinstance(each, Layout) or (what == "controls" and each is None)):
                raise InputError(what, type(each).__name__, "a Layout")
        self.layout, self.controls = layout, controls or Layout(layout.mpi, layout.n_owned, natural=layout.natural)
        self.state_dim, self.control_dim = layout.n_owned, self.controls.n_owned
        self.local = LocalEquation(self)
        self._blocks: tuple[Tensor, dict[str, StepMatrix]] | None = None  # for these lengths of steps

    @abstractmethod
    def local_residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """The rows of F that this rank owns, for a batch of steps; by torch functions, see `residual`.

        Args:
            u_old, u_new: states, owned ones and ghosts, (batch, layout.n_all).
            z: controls, owned ones and ghosts, (batch, controls.n_all).
            steps: the steps, and the global parameters.

        Returns:
            (batch, layout.n_owned).
        """

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        """F of owned rows, (batch, n_owned), from owned unknowns. Collective over the ranks of a step."""
        return self.local_residual(*extended(self.layout, self.controls, u_old, u_new, z), steps)

    def linearize(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> SparseStepJacobian:
        """The step Jacobian, its blocks found from the rows of each rank alone. Collective over the ranks of a step.

        Raises:
            InputError: a pattern that misses derivatives, or none where a step is spread over ranks.
        """
        pattern = self.pattern
        if pattern is None:
            legal = "self.pattern = StepPattern(A, B, C, W) with rows of this rank and columns of its layout"
            raise InputError("the pattern of a SpaceConstraint", f"{self.layout.n_all} unknowns without one", legal)
        if not self.is_affine:
            point = extended(self.layout, self.controls, u_old, u_new, z)
            return SpaceStepJacobian.colored(self.local, *point, steps, pattern)
        dt = steps.lengths
        if self._blocks is None or not torch.equal(self._blocks[0], dt):
            self._blocks = dt, self._affine_blocks(steps[: len(dt)], pattern)
        if not steps.p.numel():
            return AffineStepJacobian(self, (u_old, u_new, z), steps, pattern, self._blocks[1])
        point = extended(self.layout, self.controls, u_old, u_new, z)
        return SpaceStepJacobian(self.local, point, steps, pattern, self._blocks[1])

    def _affine_blocks(self, steps: Steps, pattern: StepPattern) -> dict[str, StepMatrix]:
        """The blocks of an affine residual by colored differences, which are exact; one block after the other.

        Their stacked pattern, and its colors, would take more memory than the blocks.
        """
        widths = {"B": self.layout.n_all, "A": self.layout.n_all, "C": self.controls.n_all}
        zero = {name: torch.zeros(len(steps), width, dtype=torch.float64) for name, width in widths.items()}
        start, found = self.local_residual(zero["B"], zero["A"], zero["C"], steps), {}
        for name in "BAC":
            declared: Sparsity = getattr(pattern, name)
            whole = widened(declared, self.controls if name == "C" else self.layout)

            def product(d: Tensor, name: str = name) -> Tensor:
                moved = zero | {name: d.expand(len(steps), -1)}
                return self.local_residual(moved["B"], moved["A"], moved["C"], steps) - start

            values, are_all = whole.fill(product, at_once=False)
            if not are_all:
                what, got = (
                    f"{type(self).__name__}.pattern",
                    "a sparsity that misses nonzero derivatives, or a residual",
                )
                raise InputError(what, f"{got} that is not affine", "step_pattern(A, B, C), or is_affine = False")
            found[name] = StepMatrix(declared, values)
        return found

    @cached_property
    def pattern(self) -> StepPattern | None:
        """The sparsity of the rows of this rank; found by differentiating at random points unless declared, None on all
        ranks of a step where it is not found on one."""
        return self.detect_pattern()

    def step_pattern(self, A: Any, B: Any, C: Any, W: Any = None) -> StepPattern:
        """A pattern from those of owned rows; blocks that couple no ranks are recognized. Collective.

        Args:
            A, B: (n_owned, layout.n_all), sparse or dense.
            C: (n_owned, controls.n_all).
            W: over [u_old | u_new | z] with ghosts, square; None where the residual has no curvature.
        """
        width = 2 * self.layout.n_all + self.controls.n_all
        W = sp.csr_matrix((width, width)) if W is None else W
        a, b = (sp.csr_matrix(each) for each in (A, B))
        return StepPattern(Sparsity(a, self.layout), self._own(b), self._own(sp.csr_matrix(C), self.controls), W)

    def _own(self, block: sp.csr_matrix, layout: Layout | None = None) -> Sparsity:
        """The pattern of a block; without its columns of ghosts where no rank has an entry there. Collective."""
        layout = layout or self.layout
        of_ghosts = block[:, layout.n_owned :]
        if layout is self.layout and not layout.is_silent and layout.all(of_ghosts.nnz == 0):
            return Sparsity(block[:, : layout.n_owned])
        return Sparsity(block, layout)

    def _as_pattern(self, J: Any, H: Any) -> StepPattern:
        n = self.layout.n_all
        return self.step_pattern(J[:, n : 2 * n], J[:, :n], J[:, 2 * n :], H)

    def _sample(self, samples: int) -> _Sample:
        whole, width = super()._sample(samples), 2 * self.layout.n_all + self.controls.n_all
        x = torch.randn(samples, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return _Sample(self.local_residual, self.layout.n_all, x, whole.lam, whole.steps)
