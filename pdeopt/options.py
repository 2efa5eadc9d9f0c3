"""Settings dataclasses filled from the PETSc options database, with checked values and help text.

A setting is a dataclass field made by `setting`; `read` fills the dataclass from the options of a
prefix and names what was got and what is legal where a value does not fit; `describe` gives its help.
"""

from __future__ import annotations

import ctypes
import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from petsc4py import PETSc

from pdeopt.errors import InputError

T = TypeVar("T")

# Names that a reader may have meant: settings (added by `read` and `describe`), and PETSc's most used.
_known: set[str] = {
    "help", "options_file", "options_left", "log_view", "malloc_dump",
    *(f"{p}ksp_{o}" for p in ("", "sqp_kkt_", "tao_nls_", "tao_ntr_")
      for o in ("type", "rtol", "atol", "max_it", "monitor", "view", "converged_reason", "gmres_restart")),
    *(f"{p}pc_{o}" for p in ("", "sqp_kkt_", "tao_nls_", "tao_ntr_")
      for o in ("type", "factor_mat_solver_type", "factor_mat_ordering_type", "fieldsplit_type")),
    *(f"tao_{o}" for o in ("type", "max_it", "max_funcs", "gatol", "grtol", "gttol", "monitor", "view",
                           "ls_type", "bncg_type", "lmvm_mat_lmvm_hist_size", "converged_reason")),
    "mat_mumps_icntl_7", "mat_mumps_icntl_14", "mat_mumps_icntl_23",
}  # fmt: skip

# Options that pdeopt itself put into the database.
_defaults: set[str] = set()

# PETSc reads these when it starts or ends, outside every solver.
_read_elsewhere = (
    "log_",
    "options_",
    "malloc",
    "help",
    "on_error",
    "fp_trap",
    "error_output",
    "skip_petscrc",
)


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    kind: type | None = None,
) -> Any:
    """A dataclass field with help text and legal values; `kind` is its type where the default is None."""
    metadata = {"help": help, "choices": choices, "at_least": at_least, "above": above, "at_most": at_most,
                "kind": kind or type(default)}  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def set_default(name: str, value: str) -> None:
    """Put an option of PETSc's into the database unless the user did; `unread` does not count it."""
    if not PETSc.Options().hasName(name):
        PETSc.Options().setValue(name, value)
        _defaults.add(name)


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


def read(cls: type[T], prefix: str = "", **defaults: Any) -> T:
    """An instance of the settings dataclass `cls` from the options `-{prefix}{name}`.

    `defaults` replace the dataclass's own. Raises `InputError` for a value that is not legal.
    """
    names = [field.name for field in dataclasses.fields(cast(Any, cls))]
    if unknown := sorted(set(defaults) - set(names)):
        raise InputError(f"{cls.__name__}: setting", ", ".join(unknown), ", ".join(names))
    database = PETSc.Options(prefix)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cast(Any, cls)):
        name = prefix + field.name
        _known.add(name)
        default = defaults.get(field.name, field.default)
        text = database.getString(field.name, None) if database.hasName(field.name) else None
        values[field.name] = default if text is None else _convert(name, field, text)
        _check("-" + name, field, values[field.name])
    return cls(**values)


def check(settings: Any) -> None:
    """Raise `InputError` where a field of a settings dataclass made by hand is not legal."""
    for field in dataclasses.fields(settings):
        _check(field.name, field, getattr(settings, field.name))


def describe(cls: type, prefix: str = "", title: str = "") -> str:
    """Help text: one line a setting, with its default and its legal values."""
    lines = [title] if title else []
    for field in dataclasses.fields(cls):
        _known.add(prefix + field.name)
        shown = "" if field.default in ("", None) else f" <{field.default}>"
        lines.append(f"  -{prefix}{field.name}{shown}: {field.metadata['help']} ({_legal(field)})")
    return "\n".join(lines)


def unread() -> list[str]:
    """Names of the options in the database that nobody has read so far, without the leading dash.

    petsc4py has no call for it before 3.22, so this asks the C library that it is linked to.
    """
    petsc = ctypes.CDLL(PETSc.__file__)
    count, names, values = ctypes.c_int64(0), ctypes.c_void_p(), ctypes.c_void_p()
    arguments = [ctypes.byref(count), ctypes.byref(names), ctypes.byref(values)]
    petsc.PetscOptionsLeftGet(None, *arguments)
    pointers = ctypes.cast(names, ctypes.POINTER(ctypes.c_char_p))
    left = [cast(bytes, pointers[i]).decode() for i in range(int(count.value) & 0xFFFFFFFF)]
    petsc.PetscOptionsLeftRestore(None, *arguments)
    return [name for name in left if not name.startswith(_read_elsewhere) and name not in _defaults]


def require_all_read() -> None:
    """Raise `InputError` for the first option that nobody has read, naming the nearest known one."""
    for name in unread():
        near = difflib.get_close_matches(name, sorted(_known), n=1, cutoff=0.5)
        hint = f"did you mean -{near[0]}? " if near else ""
        raise InputError("option", f"-{name}, which nothing in this run reads", f"{hint}(-help lists all)")


def _convert(name: str, field: Any, text: str) -> Any:
    kind = field.metadata["kind"]
    if kind is bool:
        words = {"": True, "1": True, "true": True, "yes": True, "on": True,
                 "0": False, "false": False, "no": False, "off": False}  # fmt: skip
        if text.lower() in words:
            return words[text.lower()]
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    raise InputError(f"-{name}", repr(text), _legal(field))


def _check(name: str, field: Any, value: Any) -> None:
    limits = field.metadata
    if value is None and field.default is None:
        return
    fits = isinstance(value, (int, float) if limits["kind"] is float else limits["kind"])
    legal = fits and (
        (limits["choices"] is None or value in limits["choices"])
        and (limits["at_least"] is None or value >= limits["at_least"])
        and (limits["above"] is None or value > limits["above"])
        and (limits["at_most"] is None or value <= limits["at_most"])
        and not (isinstance(value, float) and not math.isfinite(value))
    )
    if not legal:
        raise InputError(name, repr(value), _legal(field))


def _legal(field: Any) -> str:
    limits = field.metadata
    if limits["choices"] is not None:
        return " | ".join(limits["choices"])
    words = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text"}
    parts = [words[limits["kind"]]]
    parts += [f">= {limits['at_least']}"] if limits["at_least"] is not None else []
    parts += [f"> {limits['above']}"] if limits["above"] is not None else []
    parts += [f"<= {limits['at_most']}"] if limits["at_most"] is not None else []
    return " ".join(parts)
