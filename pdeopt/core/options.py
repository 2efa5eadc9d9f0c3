"""PETSc's options database: defaults of pdeopt's own, and options that nothing has read."""

from __future__ import annotations

import ctypes
import difflib
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from petsc4py import PETSc

from pdeopt.core.errors import InputError

#: Numbers as every language writes them: no underscores, no digits of other scripts.
INTEGER = re.compile(r"[+-]?[0-9]+")
REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)

_SOLVERS = ("", "sqp_kkt_", "tao_nls_", "tao_ntr_")
_KSP = "type rtol atol max_it monitor view converged_reason gmres_restart"
_PC = "type factor_mat_solver_type factor_mat_ordering_type fieldsplit_type"
_TAO = "type max_it max_funcs gatol grtol gttol monitor view ls_type bncg_type lmvm_mat_lmvm_hist_size converged_reason"
_PETSC = "help options_file options_left log_view malloc_dump mat_mumps_icntl_7 mat_mumps_icntl_14 mat_mumps_icntl_23"

# Names that a reader may have meant: PETSc's most used, and those that `remember` adds.
_known: set[str] = {
    *_PETSC.split(),
    *(f"{solver}ksp_{name}" for solver in _SOLVERS for name in _KSP.split()),
    *(f"{solver}pc_{name}" for solver in _SOLVERS for name in _PC.split()),
    *(f"tao_{name}" for name in _TAO.split()),
}

# Options that pdeopt itself put into the database.
_defaults: set[str] = set()

# Whether `warn_if_not_read` has.
_has_warned = False

# PETSc reads these when it starts or ends, outside every solver; the last one pdeopt does, where it sends from a GPU.
_PETSC_READS = "log_ options_ malloc help on_error fp_trap error_output skip_petscrc use_gpu_aware_mpi"
_read_elsewhere = tuple(_PETSC_READS.split())


def remember(name: str) -> None:
    """Take a name among those that `require_all_read` suggests."""
    _known.add(name)


def warn_if_not_read(name: str) -> None:
    """Warn, once, of an option on the command line that PETSc was not given: nobody called `petsc4py.init`."""
    global _has_warned
    if not _has_warned and f"-{name}" in sys.argv[1:] and not PETSc.Options().hasName(name):
        _has_warned = True
        remedy = "call petsc4py.init(sys.argv) at the beginning of the program"
        warnings.warn(f"options of the command line, such as -{name}, are not read: {remedy}", stacklevel=3)


def set_default(name: str, value: str) -> None:
    """Put an option of PETSc's into the database unless the user did; `unread` does not count it."""
    if not PETSc.Options().hasName(name):
        PETSc.Options().setValue(name, value)
        _defaults.add(name)


def given_options() -> set[str]:
    """Names of the user's options, without the leading dash and without those of `set_default`."""
    return set(PETSc.Options().getAll()) - _defaults


def take_back(*names: str) -> None:
    """Remove options that `set_default` has put into the database; those of the user stay."""
    for name in _defaults & set(names):
        PETSc.Options().delValue(name)
        _defaults.discard(name)


@contextmanager
def defaults(values: dict[str, str]) -> Iterator[None]:
    """Options that hold inside the block unless the user gave them."""
    added = [name for name in values if not PETSc.Options().hasName(name)]
    for name in added:
        PETSc.Options().setValue(name, values[name])
    try:
        yield
    finally:
        for name in added:
            PETSc.Options().delValue(name)


def unread() -> list[str]:
    """Names of the options in the database that have not been read so far, without the leading dash.

    petsc4py has no call for it before 3.22, so this asks the C library that it is linked to.
    """
    petsc = ctypes.CDLL(PETSc.__file__)
    count, names, values = ctypes.c_int64(0), ctypes.c_void_p(), ctypes.c_void_p()
    arguments = [ctypes.byref(count), ctypes.byref(names), ctypes.byref(values)]
    petsc.PetscOptionsLeftGet(None, *arguments)
    pointers = ctypes.cast(names, ctypes.POINTER(ctypes.c_char_p))
    left = [cast(bytes, pointers[i]).decode() for i in range(int(count.value) & 0xFFFFFFFF)]
    petsc.PetscOptionsLeftRestore(None, *arguments)
    program = {"c"} if sys.argv[:1] == ["-c"] else set()  # of `python -c`, which petsc4py takes for an option
    return [name for name in left if not name.startswith(_read_elsewhere) and name not in _defaults | program]


def require_all_read() -> None:
    """Raise `InputError` for the first option that has not been read, naming the nearest known one."""
    for name in unread():
        near = difflib.get_close_matches(name, sorted(_known), n=1, cutoff=0.5)
        hint = f"did you mean -{near[0]}? " if near else ""
        raise InputError("option", f"-{name}, which nothing in this run reads", f"{hint}(-help lists all)")
