"""Torch tensors that alias the memory of a PETSc Vec, inside `with` only.

This is the one file of pdeopt that touches Vec memory. A tensor that outlives its block would leave
the Vec's cached norms stale, so both managers empty their tensor on leaving.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.errors import InputError

#: A NumPy array; shapes and kinds are in the docstrings.
Array = np.ndarray[Any, Any]


with warnings.catch_warnings():  # torch says once that it minds arrays that NumPy marks as not writable
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(8)))


@contextmanager
def readonly(vec: PETSc.Vec) -> Iterator[Tensor]:
    """The local entries of `vec`, shape (n_local,), to read.

    Raises `RuntimeError` on leaving if the tensor was written to: PETSc would not have noticed.
    """
    array = vec.getArray(readonly=True)
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # whose tensors would not count what is written
            tensor = torch.from_numpy(array)
    else:
        tensor = torch.from_numpy(array)
    version = tensor._version
    try:
        yield tensor
        if tensor._version != version:
            raise RuntimeError("a readonly view of a PETSc Vec was written to; use writable(vec)")
    finally:
        tensor.set_()  # type: ignore[call-overload]


@contextmanager
def writable(vec: PETSc.Vec) -> Iterator[Tensor]:
    """The local entries of `vec`, shape (n_local,), to read and write."""
    with vec as array:
        tensor = torch.from_numpy(array)
        try:
            yield tensor
        finally:
            tensor.set_()  # type: ignore[call-overload]


def copy(vec: PETSc.Vec) -> Tensor:
    """A copy of the local entries of `vec`, shape (n_local,), that is safe to keep."""
    return torch.from_numpy(vec.getArray(readonly=True).copy())


def real_array(values: Any, what: str) -> Array:
    """Real numbers, in any form in which users have them, as a new array in double precision.

    Args:
        values: a number, lists, an array or a tensor of any real type, byte order and stride, or a vector, of which
            the local entries; a masked array stays one if entries are masked.
        what: they are, for the error.

    Raises:
        InputError: no real numbers: complex, strings, objects, lists of unlike length.
    """
    if isinstance(values, PETSc.Vec):
        return copy(values).numpy()
    kind = f"{type(values).__name__} of type {getattr(values, 'dtype', type(values).__name__)}"
    if isinstance(values, Tensor) and not values.is_complex():
        values = values.detach().cpu().to(torch.float64).resolve_neg().numpy()
    try:
        array = values if isinstance(values, np.ma.MaskedArray) else np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # rows of unlike length, tensors among them that need gradients
        raise InputError(what, kind, "real numbers") from None
    if array.dtype.kind not in "fiub":
        raise InputError(what, f"{type(values).__name__} of type {array.dtype}", "real numbers")
    if isinstance(array, np.ma.MaskedArray) and not np.any(array.mask):
        array = np.asarray(array)
    return array.astype(np.float64, order="C")


def real_number(value: Any, what: str, legal: str = "a finite number", above: float = -math.inf) -> float:
    """One finite real number in any form, for instance an array without axes.

    Args:
        value: the number; it has no axes.
        what: it is, for the error.
        legal: what it may be, for the error.
        above: it must be larger.

    Raises:
        InputError: no number, NaN, infinite, or not above.
    """
    array = real_array(value, what)
    if array.ndim or isinstance(array, np.ma.MaskedArray) or not np.isfinite(array) or not array > above:
        raise InputError(what, array.tolist() if not array.ndim else f"shape {array.shape}", legal)
    return float(array)


def flat(values: Any, what: str) -> Tensor:
    """A number, list, array, tensor or vector as a new flat tensor in double precision; masked entries are NaN.

    Args:
        values, what: as in `real_array`, which also says what is refused.
    """
    array = np.ma.filled(real_array(values, what), np.nan)  # type: ignore[no-untyped-call]
    return torch.from_numpy(array.reshape(-1))


def assign(vec: PETSc.Vec, *blocks: Tensor) -> None:
    """Write the blocks, flattened, one after another into the local entries of `vec`."""
    with vec as array:
        start = 0
        for block in blocks:
            array[start : start + block.numel()] = block.detach().reshape(-1).numpy()
            start += block.numel()


def destroyed_with(holder: object, objects: list[Any]) -> list[Any]:
    """A list of PETSc objects, which may grow; they are destroyed when their holder is gone.

    (petsc4py would only queue them, see `free_garbage`.)
    """
    weakref.finalize(holder, _destroy, objects)
    return objects


def _destroy(objects: list[Any]) -> None:
    for each in objects:
        each.destroy()


def free_garbage(comm: PETSc.Comm) -> None:
    """Free the PETSc objects that Python let go of: petsc4py only queues them. Collective."""
    for each in (comm, PETSc.COMM_SELF):
        PETSc.garbage_cleanup(each)


def index_array(indices: Tensor | Array) -> Array:
    """Indices in the integer type of this PETSc."""
    return np.ascontiguousarray(np.asarray(indices), dtype=PETSc.IntType)
