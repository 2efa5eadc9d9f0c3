"""Local solves for conjugate gradients on J'J + lam d: each with the unknowns of a part."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pdeopt.optimize.squares.sharedjacobian import SharedJacobian
from pdeopt.squares.gram import add_gram

#: As the options say.
LOCAL_SOLVES, PART_ORDERS = ("none", "additive", "multiplicative"), ("neighbors", "random")


class LocalParts:
    """Blocks of J'J + lam d for parts of this rank's unknowns, factored; what couples parts is left out.

    Args:
        J: the Jacobian, this rank's columns of it.
        size: unknowns of a part.
        order: "neighbors", as they stand in x: groups of neurons of a network; or "random".
        d: mean diagonal of J'J.

    Attributes:
        parts: this rank's numbers of the unknowns of each.
        factorizations, multiplications: so far; the latter about those of all ranks.
    """

    def __init__(self, J: SharedJacobian, size: int, order: str, d: float) -> None:
        self.J, self.d, self.lam = J.matrix, d, math.nan
        count = self.J.shape[1]
        numbers = torch.arange(count)
        if order == "random":
            numbers = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        self.parts = [part.sort()[0] for part in numbers.split(size)]
        self.grams = [self._gram(part) for part in self.parts]
        self.factors = list[Tensor]()
        self.size, self.whole = size, J.columns.size
        self.factorizations, self.multiplications = 0, 0.5 * J.entries * size

    def _columns(self, part: Tensor) -> Tensor:
        """Of J; a view where they stand in a row."""
        first, last = int(part[0]), int(part[-1]) + 1
        return self.J[:, first:last] if last - first == len(part) else self.J[:, part]

    def _gram(self, part: Tensor) -> Tensor:
        gram = torch.zeros(len(part), len(part), dtype=self.J.dtype)
        add_gram(gram, self._columns(part))
        return gram

    def set_damping(self, lam: float) -> None:
        """Factor the blocks for this lam > 0; with more of it where rounding makes one indefinite."""
        if lam == self.lam:
            return
        self.lam, self.factors = lam, [self._factor(gram, lam * self.d) for gram in self.grams]
        self.factorizations += 1
        self.multiplications += self.size**2 * self.whole / 6.0

    def _factor(self, gram: Tensor, shift: float) -> Tensor:
        rounding = torch.finfo(gram.dtype).eps * len(gram) * float(gram.diagonal().max())
        for least in (0.0, rounding, 100.0 * rounding):
            matrix = gram.double() if least == 0.0 else gram.clone().double()
            matrix.diagonal().add_(max(shift, least))
            factor, info = torch.linalg.cholesky_ex(matrix)
            if int(info) == 0:
                found: Tensor = factor.to(gram.dtype)
                return found
        return torch.eye(len(gram), dtype=gram.dtype) * math.sqrt(shift + float(gram.diagonal().sum()))

    def solve(self, s: Tensor) -> Tensor:
        """All parts at once, from the same s: additive."""
        z = torch.empty_like(s)
        for part, factor in zip(self.parts, self.factors):
            z[part] = _solved(factor, s[part])
        return z

    def sweep(self, s: Tensor) -> Tensor:
        """One part after the other, each with what is left of s, and back again: multiplicative, and symmetric."""
        z, left = torch.zeros_like(s), torch.zeros(len(self.J), dtype=self.J.dtype)
        there = list(zip(self.parts, self.factors))
        for part, factor in [*there, *reversed(there[:-1])]:
            J = self._columns(part)
            own = s[part] - (J.T @ left).double() - self.lam * self.d * z[part]
            more = _solved(factor, own)
            z[part] += more
            left += J @ more.to(J.dtype)
        return z


def _solved(factor: Tensor, s: Tensor) -> Tensor:
    found: Tensor = torch.cholesky_solve(s[:, None].to(factor.dtype), factor)[:, 0].double()
    return found
