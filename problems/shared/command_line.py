"""The command line of a problem script: PETSc options, -help, exit codes.

A script states its options as sections, `OPTIONS = sections(BurgersSettings) + case.OPTIONS`, wraps its main() in
`command_line`, says by `finish` how it ended when all files are written, and runs as a program by `start`. Exit codes,
on all ranks:

* 0: converged, or the work that was asked for is done: epochs, evaluations, seconds;
* 1: anything unexpected, with a traceback;
* 2: bad input, in one line; nothing is written;
* 3: not converged; the files are written, and a line says what to try. 0 with `-error_if_not_converged false`;
* 130, 143: interrupted by SIGINT, SIGTERM.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from mpi4py import MPI
from petsc4py import PETSc

import pdeopt as po
from pdeopt.core import Interrupted, Section, check_petsc_values, leave
from pdeopt.core.lazy import is_name
from pdeopt.core.options import set_default
from pdeopt.core.petsc_values import given_types

#: Words that ask for help.
HELP = ("-help", "--help", "-h")


#: Exit codes.
UNEXPECTED, BAD_INPUT, NOT_CONVERGED = 1, 2, 3

#: Of the `command_line` that is open, whether a run in it that does not converge ends the program.
_strict: list[bool] = []


@dataclass(frozen=True)
class EndSettings(po.Settings):
    """How a program ends."""

    error_if_not_converged: bool = po.setting(True, "leave with exit code 3 where the run has not converged, else 0")


@contextmanager
def command_line(argv: Sequence[str] | None, doc: str | None, options: Sequence[Section]) -> Iterator[None]:
    """Make `argv` PETSc's options inside the block; None stands for what PETSc was started with.

    Args:
        argv: the words, without the program's name.
        doc: what -help begins with.
        options: all groups of options that the script can read.

    Raises:
        SystemExit: with code 0 after -help.
        InputError: a word that belongs to no option, -options_file that names no file, or an option of PETSc's that
            has no legal value.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _refuse_strays(words)
    inserted = _insert(words) if argv is not None else []
    try:
        if set(HELP) & set(words):
            _help(doc or "", options)
            raise SystemExit(0)
        check_petsc_values()
        _strict.append(po.read(EndSettings).error_if_not_converged and argv is None)
        yield
    finally:
        _strict.clear()
        for name in inserted:
            PETSc.Options().delValue(name)


def finish(name: str, converged: bool, message: str) -> None:
    """Say how a run ended; the last that a script does, when all files are written.

    Args:
        name: of the script.
        converged: or the work that was asked for is done.
        message: why not, and what to try.

    Raises:
        SystemExit: of a program that has not converged, with code 3, unless `-error_if_not_converged false`.
    """
    if converged:
        return
    PETSc.Sys.Print(f"{name}: not converged: {message}")
    if _strict and _strict[-1]:
        raise SystemExit(NOT_CONVERGED)


def _refuse_strays(words: Sequence[str]) -> None:
    before = ""
    for word in words:
        if not is_name(word) and not is_name(before):
            raise po.InputError("command line", f"the word {word!r}, which belongs to no option", "-name value")
        before = word


def _insert(words: list[str]) -> list[str]:
    """Put words into the options database as PETSc's own parser does; returns the names."""
    names = []
    for word, following in zip(words, [*words[1:], "-"]):
        if is_name(word):
            value = "" if is_name(following) or following == "-" else following
            PETSc.Options().setValue(word.lstrip("-"), value)
            names.append(word.lstrip("-"))
            if names[-1] == "options_file":
                if not os.path.isfile(value):
                    raise po.InputError("-options_file", f"{value}, which is no file", "a file of options")
                try:
                    lines = Path(value).read_text().splitlines()
                except (OSError, UnicodeDecodeError) as error:
                    raise po.InputError("-options_file", f"{value} ({error})", "a file of options") from None
                found = [word for line in lines for word in line.split("#")[0].split()]
                _refuse_strays(found)
                names += _insert(found)
    return names


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
    """Call main() as the program: exit codes, see above, and no rank left waiting for one that failed."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the arrays of one step are too small to share
    set_default("options_left", "no")  # a debugging PETSc prints a list, where one line has said what is wrong
    try:
        main()
    except po.InputError as error:
        leave(BAD_INPUT, f"error: {error}")
    except po.SolveFailure as error:
        leave(NOT_CONVERGED, f"not converged: {error}")
    except Interrupted as signal:
        leave(signal.exit_code, f"interrupted: {signal}")
    except Exception as error:  # the outermost call: whatever it is, no rank may be left waiting
        if _is_out_of_memory(error):
            leave(BAD_INPUT, f"error: out of memory: {_last_line(error)}; legal: smaller sizes")
        if isinstance(error, PETSc.Error) and (types := given_types()):
            chosen = ", ".join(f"-{name} {value}" for name, value in types.items())
            leave(BAD_INPUT, f"error: PETSc refuses {chosen}: {_last_line(error)}")
        leave(UNEXPECTED, traceback.format_exc())


def _last_line(error: Exception) -> str:
    """What PETSc says after its calls, and others at all."""
    return re.sub(r"^\[\d+\] ", "", str(error).strip().split("\n")[-1])


def _is_out_of_memory(error: Exception) -> bool:
    """Of Python and NumPy, of PyTorch, or of PETSc (its error 55)."""
    torch_words = ("can't allocate memory", "Storage size calculation overflowed", "not enough memory")
    is_torchs = isinstance(error, RuntimeError) and any(words in str(error) for words in torch_words)
    is_petscs = isinstance(error, PETSc.Error) and error.ierr == 55
    return isinstance(error, MemoryError) or is_torchs or is_petscs
