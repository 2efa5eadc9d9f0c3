"""Quasi-Newton approximations H of the inverse Hessian: a few secant pairs, or a dense matrix.

Both keep what they are given: pairs s = x_+ - x, y = f'(x_+) - f'(x) with y.s > 0. A pair without is refused.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from pdeopt.errors import InputError
from pdeopt.smooth import SmoothFunction

#: y.s must exceed this fraction of |y||s|.
CURVATURE = 1e-10


class InverseHessian(Protocol):
    """H, an approximation of f''^-1."""

    def times(self, g: Tensor) -> Tensor:
        """H g."""

    def update(self, s: Tensor, y: Tensor, curvature: float | None = None) -> bool:
        """Take in a pair; `curvature` is s.H^-1 s where it is known. A pair without curvature is not taken: False."""

    def reset(self) -> None:
        """Forget all pairs."""

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""


class LimitedMemory:
    """H of L-BFGS in compact form (R. H. Byrd, J. Nocedal, R. B. Schnabel, Math. Program. 63, 1994, theorem 2.2).

    H = c I + [S cY] [[R^-T (D + c Y'Y) R^-1, -R^-T], [-R^-1, 0]] [S cY]', c = y.s / y.y of the last pair, R the upper
    triangle of S'Y, D its diagonal: two products with all pairs, whatever their number.

    Args:
        function: whose unknowns they are; gives inner products.
        pairs: kept at most; 0 for steepest descent.
    """

    def __init__(self, function: SmoothFunction, pairs: int) -> None:
        if pairs < 0:
            raise InputError("memory of L-BFGS", pairs, "an integer >= 0")
        self.function, self.pairs = function, pairs
        self.reset()

    def reset(self) -> None:
        self.S = self.Y = torch.empty(0, self.function.size, dtype=torch.float64)
        self.SY = self.YY = torch.empty(0, 0, dtype=torch.float64)

    def times(self, g: Tensor) -> Tensor:
        """H g."""
        m = len(self.S)
        if m == 0:
            return g.clone()
        c = float(self.SY[-1, -1] / self.YY[-1, -1])
        both = self.function.sum(torch.cat([self.S @ g, self.Y @ g]))
        R = self.SY.triu()
        w = torch.linalg.solve_triangular(R, both[:m, None], upper=True)[:, 0]  # R^-1 S'g
        inner = self.SY.diagonal() * w + c * (self.YY @ w - both[m:])
        top = torch.linalg.solve_triangular(R.T, inner[:, None], upper=False)[:, 0]
        found: Tensor = g * c + self.S.T @ top - self.Y.T @ (c * w)
        return found

    def update(self, s: Tensor, y: Tensor, curvature: float | None = None) -> bool:
        """Take in a pair, and let the oldest go."""
        if self.pairs == 0:
            return True
        first = len(self.S) + 1 - self.pairs if len(self.S) == self.pairs else 0
        S, Y = torch.cat([self.S[first:], s[None]]), torch.cat([self.Y[first:], y[None]])
        m = len(S)
        sums = self.function.sum(torch.cat([S @ y, Y @ s, Y @ y, (s @ s)[None]]))
        Sy, Ys, Yy, ss = sums[:m], sums[m : 2 * m], sums[2 * m : 3 * m], float(sums[-1])
        if not float(Sy[-1]) > CURVATURE * math.sqrt(ss * float(Yy[-1])):
            return False
        self.S, self.Y = S, Y
        self.SY = _bordered(self.SY[first:, first:], Ys[:-1], Sy)
        self.YY = _bordered(self.YY[first:, first:], Yy[:-1], Yy)
        return True

    def memory(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in ("S", "Y", "SY", "YY")}

    def recall(self, memory: dict[str, Any]) -> None:
        self.S, self.Y, self.SY, self.YY = (memory[name].clone() for name in ("S", "Y", "SY", "YY"))


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
    """

    def __init__(self, function: SmoothFunction, kind: str = "ssbroyden", team: Any = None, wait: int = 16) -> None:
        self.function, self.kind, self.team, self.wait = function, kind, team, wait
        sizes = function.comm.allgather(function.size)
        self.n, begin = sum(sizes), sum(sizes[: function.comm.rank])
        self.rows = slice(begin, begin + function.size)
        if team is not None and team.size > 1:
            cuts = [self.n * r // team.size for r in range(team.size + 1)]
            self.rows = slice(cuts[team.rank], cuts[team.rank + 1])
        self.reset()

    def reset(self) -> None:
        own = self.rows.stop - self.rows.start
        self.H = torch.zeros(own, self.n, dtype=torch.float64)
        self.H[torch.arange(own), torch.arange(self.rows.start, self.rows.stop)] = 1.0
        self.factor = 1.0  # the matrix is factor (H + left waiting')
        self.left = torch.empty(2 * self.wait, own, dtype=torch.float64)
        self.right = torch.empty(2 * self.wait, self.n, dtype=torch.float64)
        self.waiting, self.first = 0, True

    def times(self, g: Tensor) -> Tensor:
        """H g."""
        whole = self._whole(g)
        left, right = self.left[: self.waiting], self.right[: self.waiting]
        own = (torch.mv(self.H, whole) + left.T @ (right @ whole)) * self.factor
        if self.team is None or self.team.size == 1:
            return own
        return torch.cat([torch.as_tensor(part) for part in self.team.allgather(own.numpy())])

    def update(self, s: Tensor, y: Tensor, curvature: float | None = None, Hy: Tensor | None = None) -> bool:
        """Take in a pair; without `curvature` the update is that of SSBFGS with b = 1.

        Args:
            Hy: where it is known, by linearity from products that are.
        """
        function = self.function
        ys, yy, ss = function.sum(torch.stack([y @ s, y @ y, s @ s])).tolist()
        if not ys > CURVATURE * math.sqrt(yy * ss):
            return False
        Hy = self.times(y) if Hy is None else Hy
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
        self.factor /= tau
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

    def _whole(self, own: Tensor) -> Tensor:
        """All entries of a vector."""
        comm = self.function.comm
        return own if comm.size == 1 else torch.cat([torch.as_tensor(part) for part in comm.allgather(own.numpy())])

    def memory(self) -> dict[str, Any]:
        return {"H": self.H.clone(), "left": self.left.clone(), "right": self.right.clone(), "factor": self.factor,
                "waiting": self.waiting, "first": float(self.first)}  # fmt: skip

    def recall(self, memory: dict[str, Any]) -> None:
        self.H, self.left, self.right = (memory[name].clone() for name in ("H", "left", "right"))
        self.factor, self.waiting = float(memory["factor"]), int(memory["waiting"])
        self.first = bool(memory["first"])


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
