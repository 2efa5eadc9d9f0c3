"""Signals that ask a run to end: SIGINT, as Ctrl-C sends it, and SIGTERM, as batch systems do.

Inside `interruptible()` the first one is only noted. A run asks after each iteration, on all ranks together, writes
what it keeps and ends; a second signal ends it at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pdeopt.core.errors import PdeoptError

#: Signals that a run answers.
SIGNALS = (signal.SIGINT, signal.SIGTERM)

_noted: list[int] = []


class Interrupted(PdeoptError):
    """A signal asked a run to end, and its iteration is done. Raised by observers; the loop above returns a reason.

    Args:
        number: of the signal.
        what: was kept, in words.
    """

    def __init__(self, number: int, what: str = "") -> None:
        self.number, self.what = int(number), what
        super().__init__(": ".join(part for part in (signal.Signals(self.number).name, what) if part))

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.number, self.what))

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.number


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, a first signal waits for `interruption` to be asked; a second one ends the process at once.

    Outside of the main thread, where Python knows no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _noted.clear()


def interruption(comm: Any) -> int:
    """The number of a signal that one of the ranks has had, 0 for none; the same on all ranks. Collective.

    Args:
        comm: mpi4py communicator, or team, of the ranks of the run.
    """
    own = _noted[0] if _noted else 0
    return own if comm.size == 1 else max(comm.allgather(own))


def _note(number: int, frame: FrameType | None) -> None:
    if _noted:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _noted.append(number)
