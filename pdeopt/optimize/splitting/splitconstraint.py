"""A constraint in blocks, each of which can be minimized exactly where the others stay: what ADMM asks of a problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from pdeopt.core.monitor import History, Reason, Result
from pdeopt.optimize.splitting.pair import Pair


@dataclass
class SplitWork:
    """What the updates took, counted.

    Attributes:
        products: multiplications of products of matrices.
        solves: multiplications of factorizations and of solves with them.
        bytes: sent by this rank.
    """

    products: float = 0.0
    solves: float = 0.0
    bytes: int = 0


class SplitConstraint(ABC):
    """min f(x) subject to a constraint that is split: x in blocks, coupled by residuals r that become zero.

    The augmented Lagrangian is L(x, lambda) = f(x) + <lambda, r(x)> + sum_k beta_k |r_k(x)|^2. ADMM minimizes it over
    one block after the other and then moves the multipliers by `ascend` (R. Glowinski, A. Marrocco, 1975; S. Boyd,
    N. Parikh, E. Chu, B. Peleato, J. Eckstein, Foundations and Trends in Machine Learning 3, 2011). Two kinds:

    - the layers of a network: W are the controls, z and a virtual variables and states, lambda the adjoints
      (`nn_adapters.LayerSplitting`);
    - the steps of a control problem in windows: what a window begins at is a copy of what the one before ends at.

    A subclass holds the present blocks, multipliers and penalties. All calls are collective over its ranks.

    Attributes:
        work: counted by the subclass.
    """

    work: SplitWork

    @abstractmethod
    def sweep(self, iteration: int) -> Iterable[Hashable]:
        """The blocks in the order in which an iteration updates them; those of a stream also take the next samples."""

    @abstractmethod
    def update(self, block: Hashable) -> None:
        """Make a block the minimum of the augmented Lagrangian, or go towards it; the others stay.

        Raises:
            SolveFailure: numbers that are not finite; the block is then as it was.
        """

    @abstractmethod
    def ascend(self) -> None:
        """Move the multipliers along the residuals."""

    @abstractmethod
    def lagrangian(self) -> float:
        """The augmented Lagrangian."""

    @abstractmethod
    def objective(self) -> float:
        """f at the present blocks."""

    @abstractmethod
    def residuals(self) -> tuple[float, float]:
        """Norm of the residuals that have multipliers, and by how much the blocks moved in the last iteration."""

    @abstractmethod
    def design(self) -> Any:
        """What the result of the run is."""

    @abstractmethod
    def memory(self) -> dict[str, Any]:
        """What a restart needs, tensors and numbers."""

    @abstractmethod
    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""

    def result(self, reason: Reason, message: str, history: History) -> Result:
        """What a run returns."""
        return Result(self.design(), reason, message, history)


class PairedConstraint(SplitConstraint):
    """A split constraint of two blocks x and y with residuals r = a(x) - b(y), a and b linear.

    What an iteration hands to the next one is b and the multipliers, so that ADMM is a fixed-point iteration for them,
    which can be accelerated, and its penalty can be chosen by the curvature that both blocks show.

    Attributes:
        pair: both sides, multipliers and penalty, which the next update of a block sees.
    """

    pair: Pair
