"""Products with derivatives by PyTorch, with the types that it leaves open, whatever its modes and threads.

Reverse mode is that of `torch.autograd` itself where no transform of torch.func is under way: an operation on few
numbers costs a microsecond there, ten under a transform, and a hundred where forward mode meets constants.

Vectors of PETSc live in the memory of the CPU, and PETSc and PyTorch's forward differentiation serve one thread at a
time. (Default types need nothing: no tensor here depends on them.)
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
        return cast(T, torch.func.jvp(function, tuple(map(_alone, point)), direction)[1])


def _alone(x: Tensor) -> Tensor:
    """x in memory of its own: PyTorch lays out tangents as the tensor is laid out, in zeros for all of its storage, and
    refuses those whose entries share it."""
    return x.clone(memory_format=torch.contiguous_format) if x._is_view() or not x.is_contiguous() else x


def vjp(function: Callable[..., Tensor], point: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
    """f'(point)' cotangent, reverse mode: one tensor for each of `point`."""
    return cast(tuple[Tensor, ...], pullback(function, point)[1](cotangent))


def pullback(function: Callable[..., Tensor], point: tuple[Tensor, ...]) -> tuple[Tensor, Callable[..., Any]]:
    """f(point), and w -> f'(point)' w, for any number of cotangents after one evaluation of f.

    What was recorded is kept as long as that function is.
    """
    if is_transformed():
        return cast(tuple[Tensor, Callable[..., Any]], torch.func.vjp(function, *point))
    variables = tuple(x.detach().requires_grad_() for x in point)
    with torch.enable_grad():
        value = function(*variables)
    return value.detach(), lambda w: _gradients((value,), variables, (w,))


def curvature(
    function: Callable[..., Tensor], point: tuple[Tensor, ...], cotangent: Tensor
) -> Callable[..., tuple[Tensor, ...]]:
    """(d_1, d_2, ...) -> the Hessian of cotangent.f at the point times a direction: one tensor for each of `point`.

    The Hessian is symmetric: reverse mode twice, for any number of directions after one evaluation of f.
    """
    if is_transformed():
        return lambda *d: jvp(lambda *x: vjp(function, x, cotangent), point, d)
    variables = tuple(x.detach().requires_grad_() for x in point)
    with torch.enable_grad():
        gradients = _gradients((function(*variables),), variables, (cotangent,), create_graph=True)
    return lambda *d: _gradients(gradients, variables, d)


def _gradients(
    values: tuple[Tensor, ...],
    variables: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """The sum of the values' transposed derivatives times cotangents; values may depend on nothing."""
    pairs = [(value, w) for value, w in zip(values, cotangents) if value.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in variables)
    return torch.autograd.grad(
        *([value for value, _ in pairs], variables, [w for _, w in pairs]),
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


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


def is_transformed() -> bool:
    """Whether a transform of torch.func is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_plain(x: Tensor) -> bool:
    """Whether `x` is of double precision and nothing is to be differentiated: its memory may then be shared."""
    return x.dtype == torch.float64 and not x.requires_grad and not is_transformed()


def is_recorded(x: Tensor) -> bool:
    """Whether `x`, of double precision, is to be differentiated by PyTorch's reverse mode alone."""
    has_tangents = torch.autograd.forward_ad._current_level >= 0
    return x.dtype == torch.float64 and x.requires_grad and not is_transformed() and not has_tangents


def plainly(function: Callable[P, R]) -> Callable[P, R]:
    """A function during which the CPU is PyTorch's default device and no graph is recorded, in users' functions, too,
    but those of derivatives.

    So parameters of theirs that require gradients are constants; derivatives come from torch.func, without a graph.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        is_elsewhere = torch.get_default_device().type != "cpu"
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu") if is_elsewhere else nullcontext():
            return function(*args, **kwargs)

    return call


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """A function that one thread at a time runs: a solve in another thread is waited for. It may call itself."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _turn:
            return function(*args, **kwargs)

    return call
