"""A program of a user's, in which the last rank, or all of them, end in some way: `python -m tests.helpers.ending WAY`.

Nothing of problems/ is used. The other ranks are in the middle of a solve that is collective.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from petsc4py import PETSc

import pdeopt as po
from pdeopt.core.errors import InputError
from tests.helpers import examples

#: The rank that ends otherwise than the others.
LAST = PETSc.COMM_WORLD.rank == PETSc.COMM_WORLD.size - 1


def say_when():
    print(f"at {time.time()}", flush=True)


def wrong(*arguments, **words):
    say_when()
    raise ZeroDivisionError("of this rank")


def solve(method="sqp", change=lambda problem: None, **words):
    problem = examples.burgers()
    if LAST:
        change(problem)
    po.solve(problem, method, **words)


def on_last(action, **words):
    """Do it in the second iteration, on the last rank."""

    def monitor(record):
        if LAST and record.iteration == 1:
            action()

    solve(monitor=monitor, **words)


def thread():
    threading.Thread(target=wrong).start()
    time.sleep(60)


def interrupt():
    say_when()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def leave(code):
    say_when()
    raise SystemExit(code)


def bad_input():
    say_when()
    raise InputError("size", 0, "1")


def caught():
    try:
        sys.exit(3)
    except SystemExit as left:
        assert left.code == 3


def shell():
    """A Krylov solver whose matrix is a context of Python."""
    matrix = PETSc.Mat().createPython(((2, None), (2, None)), comm=PETSc.COMM_WORLD)
    matrix.setPythonContext(type("Context", (), {"mult": lambda self, A, x, y: wrong() if LAST else x.copy(y)})())
    matrix.setUp()
    ksp = PETSc.KSP().create()
    ksp.setOperators(matrix)
    ksp.getPC().setType("none")
    x, b = matrix.createVecs()
    b.set(1.0)
    ksp.solve(b, x)
    x.norm()


WAYS = {
    "residual": lambda: solve(change=lambda problem: setattr(problem.constraint, "residual", wrong)),
    "objective": lambda: solve(change=lambda problem: setattr(problem.objective, "value", wrong)),
    "tao": lambda: solve("tao", lambda problem: setattr(problem.constraint, "residual", wrong)),
    "shell": shell,
    "monitor": lambda: on_last(wrong),
    "monitor of tao": lambda: on_last(wrong, method="tao"),
    "callback": lambda: solve(callback=lambda result: wrong() if LAST else None),
    "thread": lambda: on_last(thread),
    "interrupt": lambda: on_last(interrupt),
    "exit": lambda: on_last(lambda: say_when() or sys.exit(3)),
    "raise exit": lambda: on_last(lambda: leave(3)),
    "exit with words": lambda: on_last(lambda: leave("enough")),
    "all raise": wrong,
    "all bad input": bad_input,
    "all exit 3": lambda: leave(3),
    "all but one raise": lambda: PETSc.COMM_WORLD.tompi4py().Barrier() if PETSc.COMM_WORLD.rank == 0 else wrong(),
    "all exit 0": lambda: leave(0),
    "one is earlier": lambda: time.sleep(0.0 if LAST else 6.0),
    "one is earlier by exit": lambda: leave(0) if LAST else time.sleep(6.0),
    "caught": caught,
}


if __name__ == "__main__":
    WAYS[sys.argv[1]]()
