"""What users give and return as numbers and vectors: taken in any real kind and type, or refused by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.errors import InputError


def number(value: Any, what: str) -> float:
    """A real number: of Python, of NumPy, or an array or tensor with one entry; NaN and infinity are numbers.

    Args:
        value: what was given.
        what: it is, for the error.

    Raises:
        InputError: anything else.
    """
    if type(value) is float:
        return value
    array = real(value)
    if array is None or array.size != 1:
        raise InputError(what, described(value), "a real number")
    return float(array.reshape(()))


def vector(value: Any, size: int, what: str, own: bool = False) -> Tensor:
    """(size,) double precision without a graph: of a tensor, an array or a list of real numbers; a number for size 1.

    Args:
        value: what was given.
        size: entries.
        what: it is, for the error.
        own: whether the result shares no memory with `value`, which its maker may go on writing to.

    Raises:
        InputError: another shape, or numbers that are not real.
    """
    if isinstance(value, Tensor) and value.dtype == torch.float64 and value.shape == (size,) and value.is_cpu:
        return value.detach().clone() if own else value.detach()
    array = real(value)
    if array is None or not (array.shape == (size,) or array.shape == () == (size - 1) * (1,)):
        raise InputError(what, described(value), f"({size},) real numbers")
    return torch.from_numpy(np.array(array.reshape(size), dtype=float))


def start(x: Any, size: int) -> Tensor:
    """Where a run begins: a copy, (size,), finite.

    Raises:
        InputError: another shape, or numbers that are not real or not finite.
    """
    found = vector(x, size, "start", own=True)
    if not bool(torch.isfinite(found).all()):
        raise InputError("start", "entries that are not finite", "finite numbers")
    return found


def pair(found: Any, what: str) -> tuple[Any, Any]:
    """The two that a function returned.

    Raises:
        InputError: not two.
    """
    if not (isinstance(found, (tuple, list)) and len(found) == 2):
        raise InputError(what, described(found), "the pair f(x), f'(x)")
    return found[0], found[1]


def described(value: Any) -> str:
    """Kind, shape and type of a value, in words."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, type {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r:.40}, a {type(value).__name__}"


def real(value: Any) -> np.ndarray[Any, Any] | None:
    """An array of real numbers; None where they are not, or where some are masked.

    Args:
        value: what was given.
    """
    if isinstance(value, np.ma.MaskedArray) and bool(np.any(value.mask)):
        return None
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):  # bfloat16, ragged lists, ...
        if not isinstance(value, Tensor) or value.is_complex() or value.is_sparse:
            return None
        array = value.detach().cpu().double().numpy()
    return array if array.dtype.kind in "fiub" else None


def order(value: float) -> int:
    """k with 2^k <= value < 2^(k + 1), value > 0."""
    return math.frexp(value)[1] - 1
