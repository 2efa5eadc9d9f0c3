"""Products with derivatives by torch.func, with the types that it leaves open, whatever PyTorch's modes and threads.

Vectors of PETSc live in the memory of the CPU, and PETSc and PyTorch's forward differentiation serve one thread at a
time. (Inference mode and default types need nothing: no tensor here depends on them.)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T", Tensor, tuple[Tensor, ...])


P = ParamSpec("P")
R = TypeVar("R")

_turn = threading.RLock()

#: The levels of forward differentiation are PyTorch's, and not a thread's.
_forward = threading.RLock()


def jvp(function: Callable[..., T], point: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> T:
    """f'(point) direction, forward mode; in the shape of what f returns."""
    with _forward:
        return cast(T, torch.func.jvp(function, point, direction)[1])


def vjp(function: Callable[..., Tensor], point: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
    """f'(point)' cotangent, reverse mode: one tensor for each of `point`."""
    return cast(tuple[Tensor, ...], torch.func.vjp(function, *point)[1](cotangent))


def gradient(function: Callable[..., Tensor], point: Tensor) -> Tensor:
    """The gradient of a scalar function of one tensor."""
    return vjp(function, (point,), torch.ones((), dtype=point.dtype))[0]


def columns(product: Callable[[Tensor], T], directions: Tensor, chunk_size: int | None = None) -> T:
    """`product` applied to each of `directions` at once; the results are stacked along a new first axis."""
    return torch.func.vmap(product, chunk_size=chunk_size)(directions)


def constant(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """function(x), not differentiated: transforms under way do not reach it, so that it may use NumPy."""
    with torch._C._DisableFuncTorch(), torch.no_grad():
        return function(x)


def is_plain(x: Tensor) -> bool:
    """Whether `x` is of double precision and no transform of torch.func is active: its memory may then be shared."""
    return x.dtype == torch.float64 and not x.requires_grad and torch._C._functorch.peek_interpreter_stack() is None


def plainly(function: Callable[P, R]) -> Callable[P, R]:
    """A function during which the CPU is PyTorch's default device and no graph is recorded, in users' functions, too.

    So parameters of theirs that require gradients are constants; derivatives come from torch.func, without a graph.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        is_elsewhere = torch.get_default_device().type != "cpu"
        with torch.no_grad(), torch.device("cpu") if is_elsewhere else nullcontext():
            return function(*args, **kwargs)

    return call


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """A function that one thread at a time runs: a solve in another thread is waited for. It may call itself."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _turn:
            return function(*args, **kwargs)

    return call
