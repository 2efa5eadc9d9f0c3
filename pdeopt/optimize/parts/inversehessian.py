"""Quasi-Newton approximations H of the inverse Hessian: a few secant pairs, or a dense matrix.

Both keep what they are given: pairs s = x_+ - x, y = f'(x_+) - f'(x) with y.s > 0. A pair without is refused.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.memory import DOUBLE, require_memory
from pdeopt.functions.smooth import Operator, SmoothFunction

#: y.s must exceed this fraction of |y||s|.
SMALLEST_CURVATURE = 1e-10


class InverseHessian(Protocol):
    """H, an approximation of f''^-1.

    Attributes:
        function: whose unknowns they are; gives inner products.
        unit_steps: whether -H g is mostly as long as the step should be.
    """

    function: SmoothFunction
    unit_steps: bool

    def times(self, g: Tensor) -> Tensor:
        """H g."""

    def update(self, s: Tensor, y: Tensor, curvature: float | None = None, g: Tensor | None = None) -> bool:
        """Take in a pair; `curvature` is s.H^-1 s where it is known. A pair without curvature is not taken: False."""

    def reset(self) -> None:
        """Forget all pairs."""

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""


class LimitedMemory:
    """H of L-BFGS in compact form (R. H. Byrd, J. Nocedal, R. B. Schnabel, Math. Program. 63, 1994, theorem 2.2).

    H = H_0 + [S Z] [[R^-T (D + Y'Z) R^-1, -R^-T], [-R^-1, 0]] [S Z]',   Z = H_0 Y, R the upper triangle of S'Y, D its
    diagonal: two products with all pairs, whatever their number. H_0 is y.s / y.y of the last pair, times the identity,
    where nothing better is known.

    Args:
        function: whose unknowns they are; gives inner products.
        pairs: kept at most; 0 for none, H = H_0.
        initial: H_0.
    """

    def __init__(self, function: SmoothFunction, pairs: int, initial: Operator | None = None) -> None:
        if pairs < 0:
            raise InputError("memory of L-BFGS", pairs, "an integer >= 0")
        self.function, self.pairs, self.initial = function, pairs, initial
        self.unit_steps = True
        self.reset()

    def reset(self) -> None:
        self.S = self.Y = self.Z = torch.empty(0, self.function.size, dtype=torch.float64)
        self.SY = self.YZ = torch.empty(0, 0, dtype=torch.float64)

    def times(self, g: Tensor) -> Tensor:
        """H g."""
        m, start = len(self.S), g if self.initial is None else self.initial(g)
        if m == 0:
            return start.clone()
        c = float(self.SY[-1, -1] / self.YZ[-1, -1]) if self.initial is None else 1.0
        Sg, Zg = self.function.sum(torch.cat([self.S @ g, self.Z @ g])).split(m)
        R = self.SY.triu()
        w = torch.linalg.solve_triangular(R, Sg[:, None], upper=True)[:, 0]  # R^-1 S'g
        inner = self.SY.diagonal() * w + c * (self.YZ @ w - Zg)
        top = torch.linalg.solve_triangular(R.T, inner[:, None], upper=False)[:, 0]
        found: Tensor = start * c + self.S.T @ top - self.Z.T @ (c * w)
        return found

    def update(self, s: Tensor, y: Tensor, curvature: float | None = None, g: Tensor | None = None) -> bool:
        """Take in a pair, and let the oldest go."""
        if self.pairs == 0:
            return True
        first, z = max(len(self.S) + 1 - self.pairs, 0), y if self.initial is None else self.initial(y)
        S, Y, Z = (torch.cat([old[first:], new[None]]) for old, new in ((self.S, s), (self.Y, y), (self.Z, z)))
        m = len(S)
        sums = self.function.sum(torch.cat([S @ y, Y @ s, Z @ y, torch.stack([s @ s, y @ y])]))
        Sy, Ys, Zy, (ss, yy) = sums[:m], sums[m : 2 * m], sums[2 * m : 3 * m], sums[3 * m :].tolist()
        if not float(Sy[-1]) > SMALLEST_CURVATURE * math.sqrt(ss * yy):
            return False
        self.S, self.Y, self.Z = S, Y, Y if self.initial is None else Z
        self.SY = _bordered(self.SY[first:, first:], Ys[:-1], Sy)
        self.YZ = _bordered(self.YZ[first:, first:], Zy[:-1], Zy)
        return True

    def memory(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in ("S", "Y", "Z", "SY", "YZ")}

    def recall(self, memory: dict[str, Any]) -> None:
        self.S, self.Y, self.Z, self.SY, self.YZ = (memory[name].clone() for name in ("S", "Y", "Z", "SY", "YZ"))


def _bordered(inner: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """[[inner, column], [row, .]]."""
    return torch.cat([torch.cat([inner, row[None]]), column[:, None]], 1)


class DenseInverse:
    """H as a dense matrix, updated by the self-scaled Broyden class.

    H <- [H - Hy (Hy)' / y.Hy + phi (y.Hy) v v'] / tau + s s' / y.s,   v = s / y.s - Hy / y.Hy

    with phi, tau of M. Al-Baali (Comput. Optim. Appl. 9, 1998) and M. Al-Baali, E. Spedicato, F. Maggioni (Optim.
    Methods Softw. 29, 2014), see `broyden`. A product and an update both run through n^2 numbers of memory; so updates
    wait, as columns, and are added `wait` at a time.

    Args:
        function: whose unknowns they are; n is the sum of its sizes over the ranks of its communicator.
        kind: "ssbroyden", "ssbfgs" (phi = 1), or "bfgs" (phi = tau = 1).
        team: communicator whose ranks share the rows, where the unknowns are on every rank; each takes a part.
        initial: H before the first pair, applied and not stored; default a multiple of the identity.
    """

    def __init__(
        self,
        function: SmoothFunction,
        kind: str = "ssbroyden",
        team: Any = None,
        initial: Operator | None = None,
        wait: int = 16,
    ) -> None:
        self.function, self.kind, self.team, self.initial, self.wait = function, kind, team, initial, wait
        self.unit_steps = kind == "bfgs"  # self-scaling only enlarges H
        sizes = function.comm.allgather(function.size)
        self.n, begin = sum(sizes), sum(sizes[: function.comm.rank])
        self.rows = slice(begin, begin + function.size)
        if team is not None and team.size > 1:
            cuts = [self.n * r // team.size for r in range(team.size + 1)]
            self.rows = slice(cuts[team.rank], cuts[team.rank + 1])
        entries = (self.rows.stop - self.rows.start) * self.n
        require_memory(DOUBLE * entries, "dense inverse Hessian", f"{self.n} unknowns", "LBFGS, which has no matrix")
        self.reset()

    def reset(self) -> None:
        own = self.rows.stop - self.rows.start
        self.H = torch.zeros(own, self.n, dtype=torch.float64)
        if self.initial is None:
            self.H[torch.arange(own), torch.arange(self.rows.start, self.rows.stop)] = 1.0
        self.factor = self.initial_factor = 1.0  # factor (H + left' right) + initial_factor H_0
        self.left = torch.zeros(2 * self.wait, own, dtype=torch.float64)  # whole in checkpoints: finite from the start
        self.right = torch.zeros(2 * self.wait, self.n, dtype=torch.float64)
        self.waiting, self.first = 0, self.initial is None
        self._last: tuple[Tensor, Tensor] | None = None  # g and H g

    def times(self, g: Tensor) -> Tensor:
        """H g."""
        if self._last is None or not torch.equal(self._last[0], g):
            self._last = (g, self._product(g))
        return self._last[1]

    def _product(self, g: Tensor) -> Tensor:
        whole = self._whole(g)
        left, right = self.left[: self.waiting], self.right[: self.waiting]
        own = (torch.mv(self.H, whole) + left.T @ (right @ whole)) * self.factor
        if self.team is not None and self.team.size > 1:
            own = torch.cat([torch.as_tensor(part) for part in self.team.allgather(own.numpy())])
        return own if self.initial is None else own + self.initial_factor * self.initial(g)

    def update(self, s: Tensor, y: Tensor, curvature: float | None = None, g: Tensor | None = None) -> bool:
        """Take in a pair; without `curvature` the update is that of SSBFGS with b = 1.

        Args:
            g: the gradient at the end of the step, if `times` was last asked for the one at its beginning: the next H g
                is then the last one plus H y, corrected by the update. (H y as the difference of two products would
                save as much; its cancellation stops convergence at small residuals.)
        """
        function = self.function
        ys, yy, ss = function.sum(torch.stack([y @ s, y @ y, s @ s])).tolist()
        if not ys > SMALLEST_CURVATURE * math.sqrt(yy * ss):
            return False
        Hy, before, self._last = self._product(y), self._last, None
        Hg = None if before is None else before[1] + Hy
        yHy = function.dot(y, Hy)
        if not yHy > 0:
            self.reset()
            return False
        h = yHy / ys
        b = 1.0 if curvature is None else max(curvature / ys, 1e-300)
        kind = self.kind if curvature is not None or self.kind == "bfgs" else "ssbfgs"
        phi, tau = broyden(b, h, self.n, kind, self.first)
        self.first = False
        cross = -phi / (tau * ys)
        s_part = (phi * h / tau + 1.0) / ys * s + cross * Hy
        Hy_part = cross * s + (phi - 1.0) / (tau * yHy) * Hy
        if g is not None and Hg is not None:
            along = function.products([s_part, Hy_part], g)
            self._last = (g, Hg / tau + along[0] * s + along[1] * Hy)
        self.factor /= tau
        self.initial_factor /= tau
        for left, right in ((s, s_part), (Hy, Hy_part)):
            self.left[self.waiting] = self._whole(left)[self.rows]
            self.right[self.waiting] = self._whole(right) / self.factor
            self.waiting += 1
        if self.waiting == len(self.left):
            self._add_waiting()
        return True

    def _add_waiting(self) -> None:
        left, right = self.left[: self.waiting], self.right[: self.waiting]
        self.H.addmm_(left.T, right, beta=self.factor, alpha=self.factor)
        self.factor, self.waiting = 1.0, 0
        self._last = None  # rounding errors no longer add up

    def _whole(self, own: Tensor) -> Tensor:
        """All entries of a vector."""
        comm = self.function.comm
        return own if comm.size == 1 else torch.cat([torch.as_tensor(part) for part in comm.allgather(own.numpy())])

    def memory(self) -> dict[str, Any]:
        own = {"H": self.H.clone(), "left": self.left.clone(), "right": self.right.clone()}
        numbers = {
            "factor": self.factor,
            "initial_factor": self.initial_factor,
            "waiting": self.waiting,
            "first": float(self.first),
        }
        return own | numbers | ({} if self._last is None else {"last_g": self._last[0], "last_Hg": self._last[1]})

    def recall(self, memory: dict[str, Any]) -> None:
        self.H, self.left, self.right = (memory[name].clone() for name in ("H", "left", "right"))
        self.factor, self.initial_factor = float(memory["factor"]), float(memory["initial_factor"])
        self.waiting = int(memory["waiting"])
        self.first = bool(memory["first"])
        self._last = (memory["last_g"].clone(), memory["last_Hg"].clone()) if "last_g" in memory else None


def broyden(b: float, h: float, n: int, kind: str, first: bool = False) -> tuple[float, float]:
    """(phi, tau) of the self-scaled Broyden class.

    Args:
        b, h: s.H^-1 s / y.s and y.Hy / y.s.
        n: unknowns.
        kind: "ssbroyden", "ssbfgs" or "bfgs".
        first: whether this is the first update, which scales more.
    """
    if kind == "bfgs":
        return 1.0, h if first else 1.0
    a = max(b * h - 1.0, 0.0)
    theta = 0.0
    if kind == "ssbroyden" and a > 0:
        rho = min(1.0, h * (1.0 - math.sqrt(a / (1.0 + a))))
        lowest, highest = (rho - 1.0) / a, 1.0 / rho
        theta = max(lowest, min(highest, (1.0 - b) / b))
    sigma = 1.0 + theta * a
    if first:
        tau = h / sigma
    else:
        shrunk = min(1.0, 1.0 / b) * abs(sigma) ** (1.0 / (1.0 - n)) if n > 1 else min(1.0, 1.0 / b)
        tau = min(shrunk, min(1.0, 1.0 / b) / theta) if theta > 0 else min(shrunk, sigma)
    return (1.0 - theta) / sigma, tau
