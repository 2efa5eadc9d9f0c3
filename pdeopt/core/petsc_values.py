"""Values of PETSc's own options: names of types, numbers and Python classes, checked before PETSc meets them.

PETSc ends in a traceback at a type that it does not know, or at a word where a number should be; it takes a negative
number of iterations in silence. `check_petsc_values` looks at every option in the database whose name ends as one of
PETSc's, whatever its prefix.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module

import numpy as np
from petsc4py import PETSc

from pdeopt.core.errors import InputError
from pdeopt.core.options import INTEGER, REAL

#: Words that PETSc takes where a number should be.
WORDS = re.compile(r"(petsc_)?(default|decide|determine|unlimited)", re.IGNORECASE)

#: Options that name a type: the registry of these types in the C library, and the package that fills it.
TYPES = {
    "ksp_type": ("KSPList", "KSPInitializePackage"),
    "pc_type": ("PCList", "PCInitializePackage"),
    "tao_type": ("TaoList", "TaoInitializePackage"),
    "tao_ls_type": ("TaoLineSearchList", "TaoLineSearchInitializePackage"),
    "snes_type": ("SNESList", "SNESInitializePackage"),
    "pc_factor_mat_ordering_type": ("MatOrderingList", "MatInitializePackage"),
}

#: Names that stand for one of several types.
COMMON = {"pc_factor_mat_ordering_type": ("external",)}

#: Options of PETSc's enumerations.
CHOICES = {
    "ksp_norm_type": "none preconditioned unpreconditioned natural",
    "ksp_pc_side": "left right symmetric",
    "pc_side": "left right symmetric",
    "pc_mg_type": "multiplicative additive full kaskade",
    "pc_mg_cycle_type": "v w",
    "pc_composite_type": "additive multiplicative symmetric_multiplicative special schur",
    "pc_fieldsplit_type": "additive multiplicative symmetric_multiplicative special schur gkb",
    "pc_fieldsplit_schur_fact_type": "diag lower upper full",
    "pc_fieldsplit_schur_precondition": "a11 self selfp user full",
    "pc_factor_shift_type": "none nonzero positive_definite inblocks",
}

#: Packages of direct solvers that a PETSc may have.
PACKAGES = (
    *("petsc", "mumps", "superlu", "superlu_dist", "umfpack", "cholmod", "klu", "spqr", "strumpack", "pastix"),
    *("mkl_pardiso", "mkl_cpardiso", "essl", "lusol", "matlab", "elemental", "cusparse", "hypre"),
)

#: Options of pdeopt that are named as PETSc's and have more words: they are checked where they are read.
OURS = ("step_pc_type",)

#: Restarts need as many vectors, and a matrix of as many rows.
MOST = {"ksp_gmres_restart": 100_000}

#: Options of whole numbers, and the least that is legal.
INTEGERS = {
    "ksp_max_it": 0,
    "ksp_gmres_restart": 1,
    "ksp_lgmres_augment": 0,
    "tao_max_it": 0,
    "tao_max_funcs": -1,
    "tao_ls_max_funcs": 0,
    "mat_lmvm_hist_size": 0,
    "pc_factor_levels": 0,
    "pc_mg_levels": 1,
    "pc_sor_its": 1,
    "pc_sor_lits": 1,
    "pc_asm_overlap": 0,
    "snes_max_it": 0,
}

#: Options of real numbers that are at least 0.
REALS = (
    *("ksp_rtol", "ksp_atol", "ksp_divtol", "snes_rtol", "snes_atol", "snes_stol"),
    *("tao_gatol", "tao_grtol", "tao_gttol", "tao_catol", "tao_crtol", "tao_steptol", "tao_trust0"),
    *("tao_ls_ftol", "tao_ls_gtol", "tao_ls_rtol", "tao_ls_stepmin", "tao_ls_stepmax"),
    *("pc_factor_shift_amount", "pc_factor_fill", "pc_factor_zeropivot", "pc_sor_omega"),
)


def check_petsc_values() -> None:
    """Check the values of all options in the database that are PETSc's.

    Raises:
        InputError: an unknown type or word, with the legal ones; a number that is none or not legal; a Python class
            that cannot be imported.
    """
    for name, value in PETSc.Options().getAll().items():
        if name in OURS:
            continue
        for endings, check in CHECKS:
            ending = next((each for each in endings if name == each or name.endswith("_" + each)), None)
            if ending is not None:
                check(name, ending, (value or "").strip())
                break


def _check_type(name: str, ending: str, value: str) -> None:
    legal = [*types_of(ending), *COMMON.get(ending, ())]
    if value not in legal:
        raise InputError(f"-{name}", value or "nothing", " | ".join(sorted(legal)))
    needed = name.removesuffix("type") + "python_type"
    if value == "python" and not PETSc.Options().hasName(needed):
        _check_class(needed, ending.removesuffix("type") + "python_type", "")


def _check_package(name: str, ending: str, value: str) -> None:
    if value not in (legal := packages()):
        raise InputError(f"-{name}", value or "nothing", " | ".join(legal))


def _check_choice(name: str, ending: str, value: str) -> None:
    if value.lower() not in (legal := CHOICES[ending].split()):
        raise InputError(f"-{name}", value or "nothing", " | ".join(legal))


def _check_integer(name: str, ending: str, value: str) -> None:
    least, most = INTEGERS[ending], MOST.get(ending, int(np.iinfo(PETSc.IntType).max))
    legal = INTEGER.fullmatch(value) and least <= int(value) <= most
    if not legal and not WORDS.fullmatch(value):
        raise InputError(f"-{name}", repr(value), f"an integer >= {least}, at most {most}")


def _check_real(name: str, ending: str, value: str) -> None:
    legal = REAL.fullmatch(value) and float(value) >= 0
    if not legal and not WORDS.fullmatch(value):
        raise InputError(f"-{name}", repr(value), "a number >= 0")


def _check_class(name: str, ending: str, value: str) -> None:
    module, _, attribute = value.rpartition(".")
    try:
        found = hasattr(import_module(module), attribute)
    except (ModuleNotFoundError, ValueError):
        found = False
    if not found:
        known = [f"pdeopt.{place}" for place in PYTHON_TYPES.get(ending, ())]
        raise InputError(f"-{name}", value or "nothing", " | ".join([*known, "a class of yours, MODULE.NAME"]))


#: Classes of pdeopt that PETSc takes as types python.
PYTHON_TYPES = {
    "tao_python_type": (
        *("optimize.LBFGS", "optimize.SSBroyden", "optimize.SPQN", "optimize.TrustRegionMinimizer", "optimize.APTS"),
        *("optimize.MGOPT", "optimize.RMTR", "optimize.MLVR", "optimize.ASTROM", "optimize.Adam"),
    ),
    "pc_python_type": (
        "precond.WathenPC",
        "precond.TimeMultigridPC",
        "precond.TimeBlockJacobi",
        "lowrank.HierarchicalPC",
    ),
}

#: Endings of options, and what checks their values.
CHECKS: tuple[tuple[tuple[str, ...], Callable[[str, str, str], None]], ...] = (
    (tuple(TYPES), _check_type),
    (tuple(CHOICES), _check_choice),
    (("pc_factor_mat_solver_type",), _check_package),
    (tuple(INTEGERS), _check_integer),
    (REALS, _check_real),
    (("tao_python_type", "pc_python_type", "ksp_python_type", "mat_python_type", "snes_python_type"), _check_class),
)


@cache
def types_of(ending: str) -> tuple[str, ...]:
    """The names that this PETSc knows, `types_of("ksp_type")`; petsc4py has no call for it."""
    petsc = ctypes.CDLL(PETSc.__file__)
    registry, fill = TYPES[ending]
    getattr(petsc, fill)()
    names, count = ctypes.POINTER(ctypes.c_char_p)(), ctypes.c_int()
    petsc.PetscFunctionListGet(ctypes.c_void_p.in_dll(petsc, registry), ctypes.byref(names), ctypes.byref(count))
    return tuple(name.decode() for name in names[: count.value] if name is not None)


@cache
def packages() -> tuple[str, ...]:
    """The packages of direct solvers that this PETSc has, for sparse matrices."""
    petsc = ctypes.CDLL(PETSc.__file__)
    petsc.MatInitializePackage()
    is_lu, found, rest = 1, ctypes.c_int(), (ctypes.c_int(), ctypes.c_void_p())
    available = []
    for name in PACKAGES:
        petsc.MatSolverTypeGet(name.encode(), b"seqaij", is_lu, ctypes.byref(found), *map(ctypes.byref, rest))
        available += [name] if found.value else []
    return tuple(available)


def given_types() -> dict[str, str]:
    """The options in the database that choose types of PETSc."""
    endings = (*TYPES, *CHOICES, "pc_factor_mat_solver_type", "python_type")
    return {name: value or "" for name, value in PETSc.Options().getAll().items() if name.endswith(endings)}
