"""What couples two blocks: both sides of the residuals, their multipliers, and the penalty."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pdeopt.optimize.splitting.couplings import Couplings


class Pair:
    """r = a(x) - b(y), with <lambda, r>_M + beta |r|_M^2 in the augmented Lagrangian. Rows are those of this rank.

    Args:
        first, second: a and b, (rows, k), equal on all ranks that hold a row.
        couplings: who holds which rows, and M.
        beta: the penalty.

    Attributes:
        relaxation: b and the multipliers see omega a + (1 - omega) b, b that of the iteration before, in place of a.
        multiplier: lambda, so that M lambda is dual to r.
    """

    def __init__(self, first: Tensor, second: Tensor, couplings: Couplings, beta: float) -> None:
        self.first, self.second, self.couplings, self.beta = first, second, couplings, beta
        self.relaxation, self.multiplier = 1.0, torch.zeros_like(first)
        self._relaxed, self._before, self._pushed = first, second, self.multiplier

    def pull(self, is_first: bool) -> Tensor:
        """c, where a block minimizes f + <c, side>_M + beta |side|_M^2 over what it has of its side."""
        if is_first:
            return self.multiplier - 2 * self.beta * self.second
        return -self.multiplier - 2 * self.beta * self._relaxed

    def move_first(self, first: Tensor) -> None:
        """The first block was minimized."""
        self.first, self._relaxed = first, self.relaxation * first + (1 - self.relaxation) * self.second
        self._pushed = self.multiplier + 2 * self.beta * (first - self.second)

    def move_second(self, second: Tensor) -> None:
        """The second block was minimized."""
        self._before, self.second = self.second, second

    def ascend(self) -> None:
        """lambda <- lambda + 2 beta r."""
        self.multiplier = self.multiplier + 2 * self.beta * (self._relaxed - self.second)

    def penalty(self) -> float:
        """<lambda, r> + beta |r|^2."""
        gram = self._gram(self.first - self.second, self.multiplier)
        return float(gram[0, 1] + self.beta * gram[0, 0])

    def residuals(self) -> tuple[float, float]:
        """|r|, and 2 beta times the last move of the second side: x was the minimum for what that was before."""
        gram = self._gram(self.first - self.second, self.second - self._before)
        return math.sqrt(max(float(gram[0, 0]), 0.0)), 2 * self.beta * math.sqrt(max(float(gram[1, 1]), 0.0))

    def _gram(self, *rows: Tensor) -> Tensor:
        return self.couplings.gram(torch.stack(rows)[:, :, None])

    # -- for accelerations -----------------------------------------------------------------------------------

    def sides(self) -> Tensor:
        """a, the multiplier lambda + 2 beta (a - b) for which x is a minimum, b, and that for which y is; stacked."""
        return torch.stack([self.first, self._pushed, self.second, self.multiplier], dim=1)

    def carried(self) -> Tensor:
        """What an iteration hands to the next one: sqrt(2 beta) b and lambda / sqrt(2 beta), (rows, 2, k).

        In their norm, an iteration does not expand where both blocks are convex.
        """
        root = math.sqrt(2 * self.beta)
        return torch.stack([root * self.second, self.multiplier / root], dim=1)

    def carry(self, values: Tensor) -> None:
        """Go on from other values of `carried`."""
        root = math.sqrt(2 * self.beta)
        self.second, self.multiplier = values[:, 0] / root, values[:, 1] * root

    # -- restarts --------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """What a restart needs, whole on the first rank. Collective."""
        rows = [self.first, self.second, self.multiplier, self._relaxed, self._before, self._pushed]
        return {"sides": self.couplings.gather(torch.stack(rows, dim=1)), "beta": self.beta}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""
        self.beta = float(memory["beta"])
        rows = self.couplings.own(memory["sides"]).unbind(1)
        self.first, self.second, self.multiplier, self._relaxed, self._before, self._pushed = (x.clone() for x in rows)
