"""A sum of squares whose rows are shared among ranks: each evaluates its own, and all have all of r."""

from __future__ import annotations

import torch
from torch import Tensor

from pdeopt.core.team import Team
from pdeopt.squares.residual import ResidualFunction
from pdeopt.squares.share import Share


class SharedRows(ResidualFunction):
    """The same sum of squares, its rows evaluated by the ranks of a team, an even part by each. Collective.

    Every rank has all unknowns and gets all of r, J d and J'w, of the same bits. Work is counted as that of the whole,
    whoever does it; a Jacobian, and rows that are asked for, are evaluated by every rank.

    Args:
        whole: the sum of squares, the same on all ranks.
        team: of ranks.

    Attributes:
        share: rows of this rank.
    """

    def __init__(self, whole: ResidualFunction, team: Team) -> None:
        super().__init__(whole.size, whole.rows, whole.samples, whole.costs, whole.tally)
        self.whole, self.team, self.share = whole, team, Share(team, whole.rows)
        self.own = torch.arange(self.share.own.start, self.share.own.stop)

    def _residual(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:
            return self.whole._residual(x, rows)
        return self.share.gather(self.share.call(lambda: self.whole._residual(x, self.own).detach()))

    def _linearize(self, x: Tensor, rows: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.share.call(lambda: self.whole._linearize(x, rows, out))

    def own_rows(self, x: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """r, (m,), and this rank's rows of J, counted as all of them; `out` as for `linearize`. Collective."""
        self.tally.jacobians += 1
        self.tally.work += self.costs.jacobian
        r, J = self.share.call(lambda: self.whole._linearize(x, self.own, out))
        return self.share.gather(r), J

    def residual_beside(self, x: Tensor) -> Tensor:
        """r, (m,), where columns of J are asked for, too: counted with these. Collective."""
        return self._residual(x)

    def columns(self, x: Tensor, begin: int, out: Tensor) -> None:
        self.tally.jacobians += 1  # all ranks count the whole, to the last bit
        self.tally.work += self.costs.jacobian
        self._columns(x, begin, out)

    def _columns(self, x: Tensor, begin: int, out: Tensor) -> None:
        self.share.call(lambda: self.whole._columns(x, begin, out))

    def _jvp(self, x: Tensor, d: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:
            return self.whole._jvp(x, d, rows)
        return self.share.gather(self.share.call(lambda: self.whole._jvp(x, d, self.own)))

    def _vjp(self, x: Tensor, w: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:
            return self.whole._vjp(x, w, rows)
        return self.share.total(self.share.call(lambda: self.whole._vjp(x, w[self.share.own], self.own)))

    def _value(self, x: Tensor) -> float:
        r = self._residual(x)
        return float(r @ r)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        r = self._residual(x)
        return float(r @ r), 2.0 * self._vjp(x, r)

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        return self.whole._hvp(x, d)

    def sample(
        self, x: Tensor, count: int, seed: int, floor: float = 0.5, candidates: int = 0, team: Team | None = None
    ) -> ResidualFunction:
        return SharedRows(self.whole.sample(x, count, seed, floor, candidates, team or self.team), self.team)

    def sample_memory(self) -> dict[str, Tensor]:
        return self.whole.sample_memory()

    def recalled(self, memory: dict[str, Tensor]) -> ResidualFunction:
        return SharedRows(self.whole.recalled(memory), self.team)
