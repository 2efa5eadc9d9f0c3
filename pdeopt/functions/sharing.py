"""Independent evaluations shared among the ranks of a team, with calls that are counted alike on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

from pdeopt.core.errors import SolveFailure, agree
from pdeopt.core.team import Team
from pdeopt.functions.smooth import Tally

T = TypeVar("T")


def share(team: Team | None, number: int, work: Callable[[int], T], tally: Tally) -> list[T]:
    """work(0), ..., work(number - 1), each done by one rank, all of them on all ranks. Collective.

    Args:
        team: None: this process does all of them.
        number: of tasks; each rank takes a contiguous part.
        work: a task by its number; its result is sent to all ranks.
        tally: where `work` counts its calls: it then has those of all ranks.

    Returns:
        the results in the order of the tasks, the same on all ranks.

    Raises:
        SolveFailure: on all ranks, where it was raised on one.
    """
    if team is None or team.size == 1:
        return [work(task) for task in range(number)]
    before, failure = tally.copy(), None
    own: list[T] = []
    try:
        own = [work(task) for task in range(number) if task * team.size // number == team.rank]
    except SolveFailure as found:
        failure = found.bare()
    agree(team, failure)
    gathered = team.allgather((own, tally - before))
    settle(tally, before, [calls for _, calls in gathered])
    return [result for results, _ in gathered for result in results]


def settle(tally: Tally, before: Tally, calls: Sequence[Tally]) -> None:
    """Count what all ranks did since `before`, in the order of the ranks: the same bits, and so limits, on all.

    Args:
        tally: of this rank; it ends as that of all.
        before: its state at the beginning.
        calls: of each rank since then.
    """
    for name, amount in asdict(before).items():
        setattr(tally, name, amount)
    for each in calls:
        tally.add(each)
