"""The command line of a problem script: PETSc options, -help, exit codes.

A script states its options as sections, `OPTIONS = sections(BurgersSettings) + case.OPTIONS`, wraps its main() in
`command_line`, and runs as a program by `start`: exit code 0, 2 for bad input, and 1 for anything unexpected, on all
ranks.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from mpi4py import MPI
from petsc4py import PETSc

import pdeopt as po
from pdeopt.core import Interrupted, Section, leave

#: Words that ask for help.
HELP = ("-help", "--help", "-h")


@contextmanager
def command_line(argv: Sequence[str] | None, doc: str | None, options: Sequence[Section]) -> Iterator[None]:
    """Make `argv` PETSc's options inside the block; None stands for what PETSc was started with.

    Args:
        argv: the words, without the program's name.
        doc: what -help begins with.
        options: all groups of options that the script can read.

    Raises:
        SystemExit: with code 0 after -help.
        InputError: -options_file names no file.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    inserted = _insert(words) if argv is not None else []
    try:
        if set(HELP) & set(words):
            _help(doc or "", options)
            raise SystemExit(0)
        yield
    finally:
        for name in inserted:
            PETSc.Options().delValue(name)


def _insert(words: list[str]) -> list[str]:
    """Put words into the options database as PETSc's own parser does; returns the names."""
    names = []
    for word, following in zip(words, [*words[1:], "-"]):
        if _is_name(word):
            value = "" if _is_name(following) or following == "-" else following
            PETSc.Options().setValue(word.lstrip("-"), value)
            names.append(word.lstrip("-"))
            if names[-1] == "options_file":
                if not os.path.isfile(value):
                    raise po.InputError("-options_file", f"{value}, which is no file", "a file of options")
                with open(value) as file:
                    names += _insert([w for line in file for w in line.split("#")[0].split()])
    return names


def _is_name(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not (word[1].isdigit() or word[1] == ".")


def _help(doc: str, options: Sequence[Section]) -> None:
    """The script's options, then those of PETSc's Krylov solvers and optimizers."""
    text = [doc.strip(), *("\n" + section.text() for section in options)]
    if MPI.COMM_WORLD.rank == 0:  # PETSc's own print has room for short lines alone
        print("\n".join(text) + "\n\nPETSc:", flush=True)
    _petsc_help()


def _petsc_help() -> None:
    PETSc.Options().setValue("help", "")
    ksp = PETSc.KSP().create()
    ksp.setOptionsPrefix("sqp_kkt_")
    tao = PETSc.TAO().create()
    for petsc_object in (ksp, tao):
        petsc_object.setFromOptions()
        petsc_object.destroy()
    PETSc.Options().delValue("help")


def start(main: Callable[[], float]) -> None:
    """Call main() as the program: exit codes, and no rank left waiting for one that failed."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the arrays of one step are too small to share
    try:
        main()
    except po.InputError as error:
        leave(2, f"error: {error}")
    except Interrupted as signal:
        leave(signal.exit_code, f"interrupted: {signal}")
    except Exception:  # the outermost call: whatever it is, no rank may be left waiting
        leave(1, traceback.format_exc())
