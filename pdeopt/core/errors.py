"""The exceptions of pdeopt, and how an error on one rank becomes an error on all of them.

`InputError` is the user's to mend and names what was got and what is legal; `SolveFailure` is raised
by inner computations and turned into a `reason` by the solver above them, never shown as a traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class PdeoptError(Exception):
    """Base of all errors raised by pdeopt."""


class InputError(PdeoptError, ValueError):
    """Bad input: the message says what was got and what is legal. Scripts exit with code 2.

        raise InputError("-heat_nt", "0", "an integer >= 2")

    Args:
        what: the argument, option or object that is wrong.
        got: what was given, in words.
        legal: what may be given, in words; choices are separated by `|`.
    """

    def __init__(self, what: str, got: object, legal: str) -> None:
        self.what, self.got, self.legal = what, got, legal
        super().__init__(f"{what}: got {got}; legal: {legal}")

    @property
    def is_option(self) -> bool:
        """Whether an option is wrong, and not what a method was asked to serve: no other method mends it."""
        return self.what.startswith("-")

    def __reduce__(self) -> tuple[Any, ...]:  # three arguments: it must survive a broadcast
        return (type(self), (self.what, self.got, self.legal))


class SolveFailure(PdeoptError, ArithmeticError):
    """An inner computation broke down: NaN, a zero pivot, no descent.

    Optimizers catch it, keep the last good point and return a `Reason`; evaluations that a user calls raise it.

    Args:
        what: broke down, and where.
        remedy: what to try, with the option to change.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        super().__init__(f"{what} ({remedy})")

    def bare(self) -> SolveFailure:
        """A copy without the traceback, for a variable of a function.

        A traceback holds the frames of all callers: one that holds the exception in turn would keep their
        objects, solvers of PETSc among them, until the cycle is found.
        """
        return type(self)(self.what, self.remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.what, self.remedy))


class StepFailure(SolveFailure):
    """A step of a batch cannot be solved.

    Args:
        what, remedy: as of `SolveFailure`.
        row: of the batch; None where all its steps are alike.
    """

    def __init__(self, what: str, remedy: str, row: int | None = None) -> None:
        super().__init__(what, remedy)
        self.row = row

    def bare(self) -> StepFailure:
        return type(self)(self.what, self.remedy, self.row)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.what, self.remedy, self.row))


class DerivativeError(PdeoptError, AssertionError):
    """A derivative does not belong to its function."""


def on_root(comm: Any, function: Callable[[], T]) -> T:
    """Call `function` on rank 0 of the mpi4py communicator `comm`; its value or its error reaches all.

    For work on files: a rank that fails alone would leave the others waiting for ever.
    """
    value: T | None = None
    error: Exception | None = None
    if comm.rank == 0:
        try:
            value = function()
        except (PdeoptError, OSError) as caught:
            error = caught
    error = comm.bcast(error)
    if error is not None:
        raise error
    return comm.bcast(value)  # type: ignore[no-any-return]


@contextmanager
def as_raised() -> Iterator[None]:
    """Around calls of PETSc that call Python: an error of pdeopt inside comes out as it was raised.

    petsc4py 3.18 hands it on; 3.26 makes it the cause of a `PETSc.Error`, of one more for each call in between.
    """
    try:
        yield
    except RuntimeError as error:  # `PETSc.Error` is one
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, PdeoptError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


def together(comm: Any, function: Callable[[], T]) -> T:
    """The value of `function` on each rank, or the `SolveFailure` that one of them meets, on all. Collective."""
    value: T | None = None
    failure = None
    try:
        with as_raised():
            value = function()
    except SolveFailure as found:
        failure = found.bare()
    agree(comm, failure)
    return value  # type: ignore[return-value]


def agree(comm: Any, failure: SolveFailure | None) -> None:
    """Raise `SolveFailure` on all ranks where one of them brings one. Collective."""
    found = next((f for f in comm.allgather(failure) if f is not None), None)
    if found is not None:
        raise found.bare()
