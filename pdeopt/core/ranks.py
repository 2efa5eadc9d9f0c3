"""How a run on several ranks ends: all of them together.

A rank that raises would leave the others waiting in their next message for ever. When pdeopt is imported under a
launcher of MPI with more than one rank, `abort_ranks_on_error` is therefore called: an exception that nothing catches,
on the main thread or another, and a `SystemExit` with a code that is not 0 end all ranks within five seconds, with the
traceback shown once and an exit code that is not 0. A rank that ends without an error waits for the others, as always.

`PDEOPT_ABORT_RANKS=0` in the environment, or `abort_ranks_on_error(False)`, leaves Python as it is.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

#: Seconds in which the other ranks may come to an end of their own, as they do where all meet the same error.
PATIENCE = 0.8

#: Seconds for mpiexec to pass on what was printed, before it is ended as well.
FLUSH = 0.3

#: Tags of messages between ranks that fail: that they have, and that they show why.
FAILED, SHOWS = 30_311, 30_312

#: Variables by which launchers say how many ranks they start, or that they start some.
LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")

_before: list[Any] = []  # the hooks that were there, while those of this module are
_ending = threading.Lock()  # taken by the first error of this process, and never given back


def abort_ranks_on_error(on: bool = True) -> None:
    """End all ranks where one of them ends with an error; see this module.

    Called when pdeopt is imported under mpiexec (or srun); for other launchers, to be called by hand. A hook that is
    put into `sys.excepthook` later replaces this one.

    Args:
        on: False takes it back.
    """
    if on and not _before:
        _before.extend((sys.excepthook, threading.excepthook, _replace_exit_code(_ExitCode())))
        sys.excepthook, threading.excepthook = _uncaught, _uncaught_in_thread
    elif not on and _before:
        sys.excepthook, threading.excepthook, member = _before
        _replace_exit_code(member)
        _before.clear()


def watch_if_launched() -> None:
    """`abort_ranks_on_error()`, where a launcher has started more than one rank and the environment allows it."""
    launched = any(os.environ.get(name, "1") != "1" for name in LAUNCHERS)
    if (launched or _world() is not None) and os.environ.get("PDEOPT_ABORT_RANKS", "1") not in ("0", "false", "no"):
        abort_ranks_on_error()


@contextmanager
def freed(*objects: Any) -> Iterator[None]:
    """Call `destroy()` of each at the end of the block, a collective call.

    Where an exception leaves the block on some of several ranks, the others are elsewhere, and a collective call would
    keep the exception from ever being seen: then it is left out.
    """
    try:
        yield
    except BaseException:
        if all_come():
            for each in objects:
                each.destroy()
        raise
    for each in objects:
        each.destroy()


def all_come() -> bool:
    """Whether all ranks of the run come here, within a moment: not where one of them failed elsewhere."""
    comm = _world()
    return comm is None or _comes(comm.Ibarrier())


def leave(code: int, text: str = "") -> NoReturn:
    """End the program with an exit code and a text on stderr, shown once, on all ranks.

    Where only some of the ranks come here, they end the others.

    Args:
        code: of the exit; 0 is none of an error.
        text: what the user is told.

    Raises:
        SystemExit: always.
    """
    comm = _world() if _before else None
    if comm is None:
        _show(text)
    else:
        _end_all(comm, code, text)
    raise SystemExit(code)


# -- the end -----------------------------------------------------------------------------------------------


def _world() -> Any:
    """MPI's communicator of all ranks, if MPI runs in this process with more than one; else None."""
    if "mpi4py.MPI" not in sys.modules and "petsc4py.PETSc" not in sys.modules:
        return None
    from mpi4py import MPI

    runs = MPI.Is_initialized() and not MPI.Is_finalized()
    return MPI.COMM_WORLD if runs and MPI.COMM_WORLD.size > 1 else None


def _end_all(comm: Any, code: int, text: str, can_wait: bool = True) -> None:
    """Return where all ranks have come here, for each to go on to its own end; else show the text and abort."""
    if not _ending.acquire(blocking=False):
        return  # by the second error of a process that ends because of its first one
    if can_wait:
        request = comm.Ibarrier()
        if not _comes(request):
            _tell(comm, FAILED)
        if _comes(request):
            texts = comm.gather(text) or []
            for each in {re.sub(r"0x[0-9a-f]+|\d+", "", each): each for each in reversed(texts)}.values():
                _show(each)
            return
    if _is_shown_by_another(comm):
        time.sleep(2 * PATIENCE)  # which ends this rank
    else:
        _tell(comm, SHOWS)
        _show(text)
    time.sleep(FLUSH)
    comm.Abort(code)


def _comes(request: Any) -> bool:
    """Whether all ranks are at the barrier within the patience."""
    deadline = time.monotonic() + PATIENCE
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _tell(comm: Any, tag: int) -> None:
    """Send empty messages, which nobody needs to receive."""
    for rank in range(comm.size):
        if rank != comm.rank:
            comm.Isend(bytearray(), rank, tag)


def _is_shown_by_another(comm: Any) -> bool:
    """Of several ranks that fail, but not all, the first shows why; or one that came so early that it does already."""
    lower = any(comm.Iprobe(rank, FAILED) for rank in range(comm.rank))
    return lower or any(comm.Iprobe(rank, SHOWS) for rank in range(comm.size))


def _show(text: str) -> None:
    sys.stdout.flush()
    if text:
        print(text.rstrip("\n"), file=sys.stderr, flush=True)


# -- what notices ------------------------------------------------------------------------------------------


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's hook for exceptions that leave the program, all but `SystemExit`."""
    comm = _world()
    if comm is None:
        _before[0](kind, error, trace)
    else:
        text = "".join(traceback.format_exception(kind, error, trace))
        _end_all(comm, 130 if issubclass(kind, KeyboardInterrupt) else 1, text)


def _uncaught_in_thread(hook: threading.ExceptHookArgs) -> None:
    """The hook of threads. The main thread may be in the middle of a message, so that there is nobody to ask."""
    comm = _world()
    if comm is None or hook.exc_type is SystemExit:
        _before[1](hook)
    else:
        text = "".join(traceback.format_exception(hook.exc_type, hook.exc_value, hook.exc_traceback))
        _end_all(comm, 1, text, can_wait=False)


class _ExitCode:
    """`SystemExit.code`, where the interpreter's reading of it is noticed.

    Python has no hook for `SystemExit`: functions of atexit are not told the code, and all that MPI and PETSc have
    registered there would wait for the other ranks. But the interpreter itself reads `code` of an exit that nothing
    has caught, and no frame of Python stands above that call.
    """

    def __get__(self, error: SystemExit | None, kind: type[SystemExit] | None = None) -> Any:
        if error is None:
            return self
        code = _before[2].__get__(error, kind)
        try:
            sys._getframe(1)
        except ValueError:
            return self._leave(code)
        return code

    def __set__(self, error: SystemExit, code: Any) -> None:
        _before[2].__set__(error, code)

    def _leave(self, code: Any) -> Any:
        comm = _world()
        if comm is None or code is None or code == 0:
            return code
        number = code if isinstance(code, int) else 1
        _end_all(comm, number, "" if isinstance(code, int) else str(code))
        return number  # a text has been shown


def _replace_exit_code(descriptor: Any) -> Any:
    """Put a descriptor into the place of `SystemExit.code`, which Python lets nobody set; the one that was there."""
    attributes = gc.get_referents(SystemExit.__dict__)[0]  # behind the read-only view
    found, attributes["code"] = attributes["code"], descriptor
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(SystemExit))
    return found
