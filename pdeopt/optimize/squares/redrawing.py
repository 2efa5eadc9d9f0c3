"""Rows that are drawn anew every few iterations: so few of them serve, and none is fitted by heart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pdeopt.core.settings import Settings, setting
from pdeopt.squares.residual import ResidualFunction

#: Rows over unknowns: at first, and when they turn out to be too few.
FIRST, LATER = 1.5, 4.5

#: The value on fresh rows, over that on those it was minimized on, from which they were too few.
OVERFITTED = 3.0


@dataclass(frozen=True)
class RedrawSettings(Settings):
    """Rows drawn anew."""

    resample_every: int = setting(0, "iterations on the same rows; 0: all rows, always", at_least=0)
    rows: int = setting(
        0, f"rows that are drawn; 0: {FIRST:g} times the unknowns, at most all where they are finite", at_least=0
    )
    more_rows: int = setting(
        0,
        f"rows from where fresh ones give a value above {OVERFITTED:g} times the old; 0: three times as many",
        at_least=0,
    )
    candidates: int = setting(
        0, "rows among which they are drawn; 0: all, or for networks ten times as many", at_least=0
    )
    floor: float = setting(0.5, "c of the density |r| / mean + ... + c of the rows", above=0)
    seed: int = setting(0, "seed of the rows", at_least=0)


class Redrawing:
    """When rows are drawn, and how many.

    Args:
        whole: of whose rows.
        settings: `RedrawSettings`.

    Attributes:
        age: iterations since the last drawing.
        drawings: so far.
        is_later: whether it draws more rows.
    """

    def __init__(self, whole: ResidualFunction, settings: RedrawSettings) -> None:
        self.whole, self.settings = whole, settings
        self.age, self.drawings, self.is_later = 0, 0, False

    @property
    def is_on(self) -> bool:
        """Whether rows are drawn at all."""
        return self.settings.resample_every > 0

    @property
    def is_due(self) -> bool:
        """Whether it is time for new rows."""
        return self.is_on and self.age >= self.settings.resample_every

    @property
    def rows(self) -> int:
        """How many are drawn."""
        first = self.settings.rows or round(FIRST * self.whole.size)
        return (self.settings.more_rows or round(LATER / FIRST * first)) if self.is_later else first

    def draw(self, x: Tensor) -> ResidualFunction:
        """The sum of squares of new rows."""
        s = self.settings
        self.drawings, self.age = self.drawings + 1, 0
        return self.whole.sample(x, self.rows, s.seed + 1000 * self.drawings, s.floor, s.candidates)

    def compare(self, old: float, fresh: float) -> None:
        """Take in the values of the old and the fresh rows at the point where the old ones were left."""
        self.is_later = self.is_later or fresh > OVERFITTED * old

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""
        return {"age": self.age, "drawings": self.drawings, "later": float(self.is_later)}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""
        self.age, self.drawings = int(memory["age"]), int(memory["drawings"])
        self.is_later = bool(memory["later"])
