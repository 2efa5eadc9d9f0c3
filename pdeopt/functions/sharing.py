"""Independent evaluations shared among the ranks of a team, with calls that are counted alike on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
    size, rank = (1, 0) if team is None else (team.size, team.rank)
    failure = None
    own: list[tuple[T, Tally]] = []
    try:
        own = [alone(partial(work, task), tally) for task in range(number) if task * size // number == rank]
    except SolveFailure as found:
        if team is None:
            raise
        failure = found.bare()
    if team is not None and size > 1:
        agree(team, failure)
        own = [pair for of_rank in team.allgather(own) for pair in of_rank]
    elif failure is not None:
        raise failure
    settle(tally, [calls for _, calls in own])
    return [result for result, _ in own]


def alone(work: Callable[[], T], tally: Tally) -> tuple[T, Tally]:
    """What `work` gives, and its own calls, which are not in `tally` until they are settled.

    Args:
        work: counts its calls in `tally`.
        tally: ends as it was.
    """
    before = tally.copy()
    tally.set(Tally())
    try:
        result = work()
    finally:
        own = tally.copy()
        tally.set(before)
    return result, own


def settle(tally: Tally, calls: Sequence[Tally]) -> None:
    """Count the calls of tasks, in the order of the tasks whoever did them: the same bits, and so limits, on all ranks.

    Args:
        tally: of this rank; it ends as that of all.
        calls: of each task.
    """
    for each in calls:
        tally.add(each)
