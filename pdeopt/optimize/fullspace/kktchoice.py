"""Which way a KKT system is solved where the user leaves it open: a rule of counts, not of clocks.

Two ways complement each other. Conjugate gradients on the reduced Hessian ("reduced") need nothing but sweeps over
time, two an iteration, and take more iterations as control gets cheaper. The matched Schur complement ("wathen") takes
about ten sweeps an iteration, has flat counts where states are observed and controls act everywhere, and fails where
not. So the first is given the work of a few iterations of the second, the second as much as it ever needs where it
fits, and then the first as much as it asks for. The same run takes the same decisions on any machine and any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

#: A way to solve, and the iterations of a solve after which the next one takes over; None for as many as it likes.
Stage = tuple[str, int | None]

#: The ways in turn for constraints with a sparsity pattern.
OPEN: tuple[Stage, ...] = (("reduced", 40), ("wathen", 20), ("reduced", None), ("direct", None))


class Choice:
    """The present way; `give_up` goes on to the next, and there is no way back.

    Args:
        stages: the ways in turn; a single one is no choice.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages, self.stage = tuple(stages), 0

    @property
    def way(self) -> str:
        """The word for it, one of `-kkt_precond`."""
        return self.stages[self.stage][0]

    @property
    def patience(self) -> int | None:
        """Iterations of a solve after which it gives up."""
        return self.stages[self.stage][1]

    def resume(self, stage: int) -> None:
        """Go on where an earlier run was, if it had the same ways."""
        self.stage = min(stage, len(self.stages) - 1)

    def give_up(self) -> bool:
        """Go on to the next way; returns whether there is one."""
        is_last = self.stage == len(self.stages) - 1
        self.stage += not is_last
        return not is_last
