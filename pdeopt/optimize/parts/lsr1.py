"""Limited-memory SR1 approximations of the Hessian, indefinite, with exact trust-region steps.

J. J. Brust, J. B. Erway, R. F. Marcia, On solving L-SR1 trust-region subproblems, Comput. Optim. Appl. 66, 2017.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.parts.trustsubproblem import TrustStep, boxed, spectral

#: From one kind of vectors to another.
Map = Callable[[Tensor], Tensor]

#: |s.(y - B s)| must exceed this fraction of |s||y - B s|.
SMALLEST_DENOMINATOR = 1e-8


class LowRank(ABC):
    """B = c I + V' W V, c > 0: its eigenvalues are c and few others, so that steps in a ball are exact.

    Args:
        function: whose unknowns they are; gives inner products.
        c: eigenvalue of almost all directions.
        V, W: (m, size) on this rank, and (m, m), symmetric.

    Attributes:
        basis: orthonormal eigenvectors, (size, m).
        eigenvalues: theirs, (m,).
    """

    def __init__(self, function: SmoothFunction, c: float, V: Tensor, W: Tensor) -> None:
        self.function = function
        self._set(c, V, W)

    def _set(self, c: float, V: Tensor, W: Tensor) -> None:
        self.c, self.V, self.W = c, V, W
        Q, R = _thin_qr(self.function, V.T)
        small = R @ W @ R.T
        values, vectors = torch.linalg.eigh(0.5 * (small + small.T))
        self.basis, self.eigenvalues = Q @ vectors, c + values

    def times(self, d: Tensor) -> Tensor:
        """B d."""
        product: Tensor = self.c * d + self.V.T @ (self.W @ self.function.sum(self.V @ d))
        return product

    @abstractmethod
    def update(self, s: Tensor, y: Tensor) -> bool:
        """Take in a pair y = B s; False where that is not possible."""

    def restricted(self, function: SmoothFunction, indices: Tensor | None = None) -> SR1:
        """R B R', for a function of some of the unknowns; None: of all."""
        return SR1(function, self.c, self.V if indices is None else self.V[:, indices], self.W)

    def step(self, g: Tensor, radius: float) -> TrustStep:
        """The minimizer of g.d + d.B d / 2 in the ball, exactly (algorithm 2 of the paper)."""
        along = self.function.sum(self.basis.T @ g)
        across = g - self.basis @ along
        eigenvalues = torch.cat([self.eigenvalues, along.new_tensor([self.c])])
        components = torch.cat([along, along.new_tensor([self.function.norm(across)])])
        d, shift = spectral(eigenvalues, components, radius)
        decrease = -float(components @ d + 0.5 * (eigenvalues * d) @ d)
        step = self.basis @ d[:-1] - across / (self.c + shift)
        return TrustStep(step, decrease, 0, float(d.norm()) >= (1.0 - 1e-10) * radius)

    def step_in_box(self, g: Tensor, radius: float, rtol: float = 1e-2, max_it: int = 50) -> TrustStep:
        """A step in the box |d_i| <= radius, by projected conjugate gradients: a product with B costs little."""
        found = boxed(self.function, self.times, g, radius, rtol, max_it)
        return TrustStep(found.d, found.decrease, 0, found.on_boundary)


class SR1(LowRank):
    """SR1 on top of a given B, for a few pairs: none of them is let go."""

    def update(self, s: Tensor, y: Tensor) -> bool:
        """B <- B + r r' / r.s, r = y - B s, on top of all that is there; False where r.s is too small."""
        r = y - self.times(s)
        sr, ss, rr = self.function.sum(torch.stack([s @ r, s @ s, r @ r])).tolist()
        if not _regular(sr, ss, rr):
            return False
        self._set(self.c, torch.cat([self.V, r[None]]), torch.block_diag(self.W, self.W.new_tensor([[1.0 / sr]])))
        return True


class LSR1(LowRank):
    """SR1 from c I by the last pairs, in compact form (Byrd, Nocedal, Schnabel 1994, theorem 5.1).

    V = Y - c S and W = M^-1, M = D + L + L' - c S'S, where D and L are the diagonal and the strict lower triangle of
    S'Y, and c = y.y / y.s of the last pair with y.s > 0.

    Args:
        pairs: kept at most, >= 1.
    """

    def __init__(self, function: SmoothFunction, pairs: int) -> None:
        if pairs < 1:
            raise InputError("memory of L-SR1", pairs, "an integer >= 1")
        self.S = self.Y = torch.empty(0, function.size, dtype=torch.float64)
        self.pairs = pairs
        super().__init__(function, 1.0, self.S, torch.empty(0, 0, dtype=torch.float64))

    def update(self, s: Tensor, y: Tensor) -> bool:
        """Take in a pair, and let the oldest go; False where the denominator is too small."""
        r = y - self.times(s)
        sr, ss, rr, sy, yy = self.function.sum(torch.stack([s @ r, s @ s, r @ r, s @ y, y @ y])).tolist()
        if not _regular(sr, ss, rr):
            return False
        first = len(self.S) + 1 - self.pairs if len(self.S) == self.pairs else 0
        self.S, self.Y = torch.cat([self.S[first:], s[None]]), torch.cat([self.Y[first:], y[None]])
        self._compact(yy / sy if sy > SMALLEST_DENOMINATOR * math.sqrt(ss * yy) else self.c)
        return True

    def pairs_by(self, of_s: Map, of_y: Map) -> tuple[list[Tensor], list[Tensor]]:
        """The pairs in other coordinates, oldest first."""
        return [of_s(s) for s in self.S], [of_y(y) for y in self.Y]

    def learn_again(self, S: list[Tensor], Y: list[Tensor], of_s: Map, of_y: Map) -> None:
        """Take these pairs, oldest first, in other coordinates, in place of all."""
        if S:
            self.S, self.Y = torch.stack([of_s(s) for s in S]), torch.stack([of_y(y) for y in Y])
            sy, yy = self.function.sum(torch.stack([self.S[-1] @ self.Y[-1], self.Y[-1] @ self.Y[-1]])).tolist()
            self._compact(yy / sy if sy > 0.0 else 1.0)

    def _compact(self, c: float) -> None:
        """B from the pairs; the oldest go where this c makes M singular."""
        while len(self.S):
            S, Y = self.S, self.Y
            SY, SS = self.function.sum(torch.stack([S @ Y.T, S @ S.T]))
            M = SY.tril() + SY.tril(-1).T - c * SS
            scale = SS.diagonal().rsqrt()
            size = torch.linalg.eigvalsh(M * scale[:, None] * scale).abs()
            if size.min() > SMALLEST_DENOMINATOR * size.max():
                break
            self.S, self.Y = S[1:], Y[1:]
        else:
            M = self.S.new_empty(0, 0)
        self._set(c, self.Y - c * self.S, torch.linalg.inv(M))

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""
        return {"S": self.S.clone(), "Y": self.Y.clone(), "c": self.c}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""
        self.S, self.Y = memory["S"].clone(), memory["Y"].clone()
        self._compact(float(memory["c"]))


def _regular(sr: float, ss: float, rr: float) -> bool:
    return math.isfinite(rr) and abs(sr) > SMALLEST_DENOMINATOR * math.sqrt(ss * rr)


def _thin_qr(function: SmoothFunction, own: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R of a tall matrix whose rows are spread over the ranks: that of each rank, then that of their R."""
    Q, R = torch.linalg.qr(own)
    if function.comm.size == 1:
        return Q, R
    parts = [torch.as_tensor(part) for part in function.comm.allgather(R.numpy())]
    begin = sum(len(part) for part in parts[: function.comm.rank])
    Q2, R = torch.linalg.qr(torch.cat(parts))
    return Q @ Q2[begin : begin + Q.shape[1]], R
