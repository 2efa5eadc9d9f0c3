"""Local solves on parts of the unknowns: by a quasi-Newton method each, on the ranks that the parts belong to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.sharing import alone, settle
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.descent.minimizer import StopSettings, part_of
from pdeopt.optimize.descent.quasinewton import LBFGS, LBFGSSettings, QuasiNewton, SSBroyden, SSBroydenSettings
from pdeopt.optimize.parts.inversehessian import InverseHessian
from pdeopt.optimize.parts.subspace import Correction

#: Methods on parts, and global ones.
METHODS = ("lbfgs", "ssbroyden")


def quasi_newton(
    name: str, function: SmoothFunction, memory: int, update: str, stop: Any = None, **rest: Any
) -> QuasiNewton:
    """The method of this name, one of `METHODS`.

    Args:
        memory: pairs of L-BFGS.
        update: of a dense H, see `SSBroydenSettings`.
        stop: when to stop, `StopSettings`.
        **rest: what the settings of both have.
    """
    if name == "lbfgs":
        return LBFGS(function, LBFGSSettings(memory, **rest), stop)
    return SSBroyden(function, SSBroydenSettings(update, **rest), stop)


class LocalSolves:
    """Steps down d -> f(x + R_s' d) for each part s, from d = 0.

    Args:
        decomposition: the parts.
        settings: `SPQNSettings`: method, number of steps, and whether its H is kept from one time to the next.
        gtol: of the whole method; parts go on to a tenth of it.
    """

    def __init__(self, decomposition: Decomposition, settings: Any, gtol: float) -> None:
        self.decomposition, self.settings = decomposition, settings
        self.stop = StopSettings(max_it=settings.local_it, gtol=0.1 * gtol)
        self.inverses: dict[int, InverseHessian] = {}

    def corrections(
        self, f: SmoothFunction, parts: Sequence[int], x: Tensor, known: tuple[float, Tensor] | None
    ) -> dict[int, Correction]:
        """What local solves on these parts from x give, on all ranks. Collective over the team.

        Args:
            known: f(x) and f'(x), if it is known.
        """
        own, mine = self.decomposition, self.decomposition.mine()
        functions: dict[int, SmoothFunction] = {}
        if not own.is_replicated:  # all ranks have a part in evaluations at x
            functions = {s: f.local(own, s, x) for s in parts}

        def solve(s: int) -> Correction:
            return self._solve(s, functions[s] if s in functions else f.local(own, s, x), known)

        found = {s: alone(partial(solve, s), f.tally) for s in parts if s in mine}
        if own.team is not None:
            for rank, others in enumerate(own.team.allgather(found)):
                if rank != own.team.rank:
                    found |= others if own.is_replicated else {s: (c.without_step(), t) for s, (c, t) in others.items()}
        settle(f.tally, [found[s][1] for s in parts])
        return {s: found[s][0] for s in parts}

    def _solve(self, s: int, local: SmoothFunction, known: tuple[float, Tensor] | None) -> Correction:
        method = self._method(local)
        at_zero = None if known is None else (known[0], known[1][self.decomposition.parts[s]])
        zero = torch.zeros(local.size, dtype=torch.float64)
        result = method.minimize(zero, known=at_zero, inverse=self.inverses.get(s), unit=1.0)
        if self.settings.keep:
            self.inverses[s] = method.inverse
        return Correction(result.design, result.history[0].objective - result.objective)

    def _method(self, local: SmoothFunction) -> QuasiNewton:
        s = self.settings
        return quasi_newton(s.local, local, s.local_memory, s.update, self.stop, line_search=s.line_search)

    def additive(self, f: SmoothFunction, x: Tensor, value: float, g: Tensor) -> dict[int, Correction]:
        """The corrections of all parts from the same x."""
        return self.corrections(f, range(len(self.decomposition)), x, (value, g))

    def multiplicative(self, f: SmoothFunction, x: Tensor, value: float, g: Tensor) -> Tensor:
        """The sum of all corrections, one color after the other, each from where the last ones led."""
        at, known = x, (value, g)
        for color in self.decomposition.colors(self.settings.colors):
            found = self.corrections(f, color, at, known if at is x else None)
            at = at + self.decomposition.assemble({s: c.d for s, c in found.items()}, weighted=False)
        return at - x

    def memory(self) -> dict[str, dict[str, Any]]:
        """What `recall` takes: any rank's memory serves any number of ranks. Collective over the team."""
        kept = {f"local.{s}": H.memory() for s, H in self.inverses.items()}
        if self.decomposition.team is not None and self.decomposition.is_replicated:
            kept = {name: H for of_rank in self.decomposition.team.allgather(kept) for name, H in of_rank.items()}
        return kept

    def recall(self, f: SmoothFunction, x: Tensor, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave, its names in one dictionary."""
        self.inverses = {}
        for s in self.decomposition.mine():
            if kept := part_of(memory, f"local.{s}"):
                method = self._method(f.local(self.decomposition, s, x))
                method.preconditioner = None
                self.inverses[s] = method.new_inverse()
                self.inverses[s].recall(kept)
