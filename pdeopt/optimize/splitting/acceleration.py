"""What ADMM does for a pair of blocks before an iteration: it chooses the penalty, and extrapolates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdeopt.optimize.splitting.anderson import Anderson
from pdeopt.optimize.splitting.pair import Pair
from pdeopt.optimize.splitting.penalty import LEARNING, WRONG_BY, spectral


class Acceleration:
    """Penalties by a rule, and Anderson acceleration of what an iteration hands to the next one.

    Args:
        pair: is changed in place.
        penalty: "fixed" or "spectral"; see `AdmmSettings`.
        depth: of Anderson acceleration; 0 for none.
    """

    def __init__(self, pair: Pair, penalty: str, depth: int) -> None:
        self.pair, self.penalty, self.depth = pair, penalty, depth
        self.anderson = Anderson(depth, pair.couplings.gram)
        self._given: Tensor | None = None
        self._sides: Tensor | None = None

    def prepare(self, iteration: int) -> str:
        """Make ready for an iteration, counted from 1; returns what was done. Collective."""
        note = "" if iteration > LEARNING else self._choose_penalty(iteration)
        if not self.depth:
            return note
        if self._given is not None:
            self.pair.carry(self.anderson.next(self._given, self.pair.carried()))
            note = note or "accelerated"
        self._given = self.pair.carried()
        return note

    def _choose_penalty(self, iteration: int) -> str:
        if self.penalty == "fixed" or iteration == 1:
            return ""
        factor = self._spectral()
        if 1 / WRONG_BY < factor < WRONG_BY:
            return ""
        self.pair.beta *= factor
        self.anderson.clear()
        self._given = None
        return f"penalty x {factor:.3g}"

    def _spectral(self) -> float:
        sides, before = self.pair.sides(), self._sides
        self._sides = sides
        if before is None:
            return 1.0
        found = spectral(self.pair.couplings.gram((sides - before).transpose(0, 1)[:, :, None]))
        return 1.0 if found is None else found / (2 * self.pair.beta)

    # -- restarts --------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """What a restart needs, whole on the first rank. Collective."""
        kept: dict[str, Any] = {"last": self.anderson.last if self.anderson.x else 0.0}
        for name, rows in (
            ("x", self.anderson.x),
            ("g", self.anderson.g),
            ("given", [self._given]),
            ("sides", [self._sides]),
        ):
            kept |= {f"{name}{k}": self.pair.couplings.gather(each) for k, each in enumerate(rows) if each is not None}
        return kept

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""

        def taken(name: str) -> list[Tensor]:
            found = [memory[key] for key in (f"{name}{k}" for k in range(self.depth + 1)) if key in memory]
            return [self.pair.couplings.own(each) for each in found]

        self.anderson.x, self.anderson.g = taken("x"), taken("g")
        self.anderson.last = float(memory["last"]) or torch.inf
        self._given = next(iter(taken("given")), None)
        self._sides = next(iter(taken("sides")), None)
