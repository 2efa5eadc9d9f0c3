"""The start of PETSc: `petsc4py.init(sys.argv)` counts, whether it comes before or after pdeopt's first use."""

from __future__ import annotations

import functools
import sys
from typing import Any

import petsc4py


def heed_late_init() -> None:
    """Let `petsc4py.init(args)` add to PETSc's options where PETSc runs already, started without arguments.

    By itself it does nothing then. Done when pdeopt is imported; PETSc is not started by it.
    """
    start = petsc4py.init

    @functools.wraps(start)
    def init(args: Any = None, *rest: Any, **others: Any) -> None:
        is_late = "petsc4py.PETSc" in sys.modules
        start(args, *rest, **others)
        if is_late:
            _insert(petsc4py.lib.getInitArgs(args)[1:])

    petsc4py.init = init


def is_name(word: str) -> bool:
    """Whether a word of a command line is the name of an option, and not a value, maybe a negative number."""
    return len(word) > 1 and word[0] == "-" and not (word[1].isdigit() or word[1] == ".")


def _insert(words: list[str]) -> None:
    from petsc4py import PETSc

    database = PETSc.Options()
    for word, following in zip(words, [*words[1:], "-"]):
        if is_name(word) and not database.hasName(word.lstrip("-")):
            database.setValue(word.lstrip("-"), "" if is_name(following) or following == "-" else following)
