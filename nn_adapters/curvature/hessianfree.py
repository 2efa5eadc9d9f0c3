"""Hessian-free optimization and natural gradients: conjugate gradients with products of the exact Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from petsc4py import PETSc
from torch import Tensor, nn

from nn_adapters.curvature.curvednetwork import summed
from nn_adapters.curvature.factors import FISHER, KroneckerFactors
from nn_adapters.curvature.likelihoods import Likelihood
from nn_adapters.curvature.secondorder import SecondOrder, chosen
from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import InputError
from pdeopt.core.settings import Settings, setting
from pdeopt.core.team import Team

#: Iterates of CG whose numbers grow by this factor are kept for backtracking (Martens 2010, section 4.6).
SPACING = 1.3


@dataclass(frozen=True)
class HessianFreeSettings(Settings, prefix="hf_"):
    """Hessian-free optimization."""

    cg_rtol: float = setting(1e-2, "relative tolerance of conjugate gradients", above=0, at_most=1)
    cg_max_it: int = setting(50, "iterations of conjugate gradients at most", at_least=1)
    precond: str = setting("kfac", "preconditioner of conjugate gradients", choices=("kfac", "none"))
    warm: float = setting(0.95, "factor of the last step in the start of conjugate gradients", at_least=0, at_most=1)
    backtrack: bool = setting(True, "take the best of the kept iterates of conjugate gradients, by the loss")
    damping: float = setting(0.1, "first damping", above=0)
    least: float = setting(1e-4, "damping at least", above=0)
    change: float = setting(2 / 3, "factor of the damping after a good step", above=0, at_most=1)
    fisher: str = setting("sampled", "targets of the factors G (with -hf_precond kfac)", choices=FISHER[:2])
    average: float = setting(0.95, "factor of the weights of older batches in the factors", at_least=0, at_most=1)
    l2: float = setting(0.0, "weight of |theta|^2 / 2 in the loss", at_least=0)
    decay: float = setting(
        0.0, "share of the weights, without biases and normalizations, that a step takes away", at_least=0, at_most=1
    )


#: Settings of the natural gradient by conjugate gradients: a few iterations from zero, and no search.
NATURAL = {"warm": 0.0, "backtrack": False, "precond": "none", "cg_rtol": 0.1, "cg_max_it": 20}


class HessianFree(SecondOrder):
    """Truncated Newton steps: PETSc's CG on (F + damping) x = -g with products of the batch's Fisher matrix F.

    For the losses here F is the generalized Gauss-Newton matrix, so that one method is both Hessian-free optimization
    (J. Martens, Deep learning via Hessian-free optimization, ICML 2010: warm starts, backtracking through the iterates
    of CG, Levenberg-Marquardt damping) and, with the settings `NATURAL`, the natural gradient by CG. K-FAC is its
    preconditioner. The damping is judged on the batch itself, which should be large. A step that does not lower the
    loss is not taken.

    On several ranks gradients and products are sums over the ranks, and every rank runs the same CG, which the first
    one ends. Factors and their inverses are on the ranks that own the layers.

    Args:
        network, likelihood, seed, team: see `KFAC`; the network is without `LayerParallel`.
        settings: keywords replace single ones.

    Attributes:
        damping, ratio: now, and the last ratio of the loss's decrease and the model's.
        iterations: of CG, in the last step.

    Raises:
        InputError: settings that are not legal, or a layer without a block of curvature.

    Example:
        >>> optimizer = nna.HessianFree(network, loss)
        >>> natural = nna.HessianFree(network, loss, **nna.NATURAL)
        >>> optimizer.step(closure)                      # see `KFAC`
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        settings: HessianFreeSettings | None = None,
        seed: int = 0,
        team: Team | None = None,
        **words: Any,
    ) -> None:
        self.settings: HessianFreeSettings = chosen(HessianFreeSettings, settings, words)
        super().__init__(network, likelihood, self.settings.l2, self.settings.decay, seed, team)
        if self.model.serial is not network:
            raise InputError("network of Hessian-free optimization", "LayerParallel", "layers that are not in parallel")
        fisher = self.settings.fisher
        self.factors = KroneckerFactors(
            self.model.serial, self.model.layers, likelihood, fisher, self.generator, team, "float64"
        )
        self.damping, self.ratio, self.iterations = self.settings.damping, math.nan, 0
        self.last: Tensor | None = None

    def advance(self, loss: float, g: Tensor) -> Tensor:
        own = self.settings
        if own.precond == "kfac":
            self.factors.average(self.model.inputs, (), own.average)
        model, fisher, shift = self.model, self.model.fisher(), self.damping + own.l2

        def times(v: Tensor) -> Tensor:
            return summed(model.team, model.share * fisher.times(v)) + shift * v

        g = summed(model.team, g)
        kept = self._solve(times, g)
        step = kept[-1]
        decrease = -0.5 * float(step.double() @ (2.0 * g + times(step)).double())
        if self.can_try:
            step = self._search(loss, kept, decrease)
        self.last = step
        return step

    def _search(self, loss: float, kept: list[Tensor], decrease: float) -> Tensor:
        """The iterate of CG that is best for the loss, going back from the last; none of them if none is better."""
        own, found = self.settings, self.value(kept[-1])
        self.ratio = (loss - found) / decrease if decrease > 0.0 else math.nan
        if self.ratio > 0.75:
            self.damping = max(self.damping * own.change, own.least)
        elif not self.ratio >= 0.25:
            self.damping /= own.change
        best = len(kept) - 1
        while own.backtrack and best > 0 and not (before := self.value(kept[best - 1])) >= found:
            best, found = best - 1, before
        if found < loss:
            return kept[best]
        self.damping *= 4.0
        return torch.zeros_like(kept[-1])

    def _solve(self, times: Callable[[Tensor], Tensor], g: Tensor) -> list[Tensor]:
        """Iterates of CG, the last one at the end."""
        own, comm, size = self.settings, PETSc.COMM_SELF, len(g)
        matrix = PETSc.Mat().createPython(((size, size), (size, size)), _Product(times, g), comm=comm)
        matrix.setUp()
        ksp = PETSc.KSP().create(comm)
        ksp.setOptionsPrefix("hf_cg_")
        ksp.setOperators(matrix)
        ksp.setType("cg")
        ksp.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
        ksp.setTolerances(rtol=own.cg_rtol, atol=0.0, max_it=own.cg_max_it)
        if own.precond == "kfac":
            inverse = self.together(lambda: self.factors.blocks().inverse(self.damping + own.l2))
            ksp.getPC().setType("python")
            ksp.getPC().setPythonContext(_Product(lambda r: self.factors.precondition(inverse, r, is_whole=True), g))
        else:
            ksp.getPC().setType("none")
        right, left = matrix.createVecs()
        assign(right, -g.double())
        ksp.setConvergenceTest(self._ended(own.cg_rtol * right.norm()))
        if self.last is not None and own.warm and bool(self.last.any()):
            assign(left, own.warm * self.last.double())
            ksp.setInitialGuessNonzero(True)
        kept: list[Tensor] = []
        following = 1.0

        def keep(solver: PETSc.KSP, iteration: int, norm: float) -> None:
            nonlocal following
            if iteration >= following:
                kept.append(copy(solver.buildSolution()).to(g))
                following = math.ceil(SPACING * following)

        if own.backtrack:
            ksp.setMonitor(keep)
        ksp.solve(right, left)
        self.iterations = ksp.getIterationNumber()
        last = copy(left).to(g)
        if not kept or not torch.equal(kept[-1], last):
            kept.append(last)
        for each in (ksp, matrix, right, left):
            each.destroy()
        return kept if self.model.team is None else list(self.model.team.bcast(torch.stack(kept)))

    def _ended(self, limit: float) -> Callable[[PETSc.KSP, int, float], int]:
        """Whether the residual has come below a limit, as the first rank sees it: rounding must not part the ranks."""
        team, reason = self.model.team, PETSc.KSP.ConvergedReason

        def ended(ksp: PETSc.KSP, iteration: int, norm: float) -> int:
            broken = reason.ITERATING if math.isfinite(norm) else reason.DIVERGED_NANORINF
            found = int(reason.CONVERGED_RTOL if norm <= limit else broken)
            return found if team is None else int(team.bcast(found))

        return ended

    def memory(self) -> dict[str, Any]:
        numbers = {"damping": self.damping, "iterations": self.iterations}
        numbers |= {"ratio": self.ratio} if math.isfinite(self.ratio) else {}
        last = {} if self.last is None else {"last": self.last.clone()}
        return super().memory() | numbers | last | self.factors.memory()

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self.damping, self.ratio = float(memory["damping"]), float(memory.get("ratio", math.nan))
        self.iterations = int(memory["iterations"])
        self.last = memory["last"].clone() if "last" in memory else None
        self.factors.recall(memory)


class _Product:
    """The context of a matrix of PETSc that multiplies by a function of tensors like g, or of such a preconditioner."""

    def __init__(self, times: Callable[[Tensor], Tensor], g: Tensor) -> None:
        self.times, self.g = times, g

    def mult(self, _: PETSc.Object, x: PETSc.Vec, y: PETSc.Vec) -> None:
        assign(y, self.times(copy(x).to(self.g)).double())

    apply = mult
