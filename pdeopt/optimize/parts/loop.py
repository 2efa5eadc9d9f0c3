"""The one iteration loop of the library: record, watch, test, step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pdeopt.core.errors import SolveFailure
from pdeopt.core.interrupt import Interrupted
from pdeopt.core.monitor import AnyRecord, History, Monitor, Reason, Result, explain


class Method(Protocol):
    """An optimizer as the loop sees it: a record of its point, a step to the next, and what it returns."""

    def record(self, iteration: int) -> AnyRecord:
        """The present point in numbers; also prepares the next step."""

    def step(self) -> Reason:
        """Go on by one iteration: ITERATING, or why there is no next point."""

    def unsolved(self) -> AnyRecord:
        """The start in numbers where even `record` failed."""

    def remedy(self, reason: Reason) -> str:
        """What to try next where it stopped for this reason."""

    def result(self, reason: Reason, message: str, history: History) -> Result:
        """The last good point: a step that failed leaves the point as it was."""


#: Called with the method and the history after each record, to save a checkpoint, say; it may raise `Interrupted`.
Observer = Callable[[Any, History], None]


def iterate(
    method: Method,
    test: Callable[[Any], Reason],
    *,
    monitors: Sequence[Monitor] = (),
    observers: Sequence[Observer] = (),
    history: History | None = None,
) -> Result:
    """Step until `test` of the last record, or the step, or an observer that is interrupted, gives a reason to stop.

    Args:
        history: records of an interrupted run that `method` goes on with; its point is that of the last one.
    """
    history, reason, detail = History(list(history.records) if history else []), Reason.ITERATING, ""
    is_again = len(history) > 0
    try:
        while reason == Reason.ITERATING:
            record = method.record(_next_iteration(history) - is_again)
            if is_again:  # at the same point, the record of before: what led there, the method has not seen
                record, is_again = _kept(history.records.pop(), record), False
            history.append(record)
            for monitor in monitors:
                monitor(record)
            for observer in observers:
                observer(method, history)
            reason = test(record)
            if reason == Reason.ITERATING:
                reason = method.step()
    except SolveFailure as failure:
        reason, detail = Reason.DIVERGED_LINEAR_SOLVE, str(failure)
        if not history.records:
            history.append(method.unsolved())
    except Interrupted as signal:
        reason, detail = Reason.INTERRUPTED, str(signal)
    return method.result(reason, explain(reason, detail, method.remedy(reason)), history)


def _kept(before: AnyRecord, again: AnyRecord) -> AnyRecord:
    is_same = (before.objective, before.optimality) == (again.objective, again.optimality)
    return before if is_same else again


def _next_iteration(history: History) -> int:
    return int(history[-1].iteration) + 1 if len(history) else 0
