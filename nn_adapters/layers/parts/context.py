"""What surrounds a solve and what it must mind: compilation, autocast, transforms of functions, and ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from mpi4py import MPI
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.steps.exchange.parcels import sum_over_ranks

Function = TypeVar("Function", bound=Callable[..., Any])

#: What to use where the cycles will not do.
SERIAL = "network.serial(), the same layers as PyTorch runs them"


def outside_compilation(function: Function) -> Function:
    """The same function, which `torch.compile` leaves to Python; without it, its module is not imported for that."""

    @wraps(function)
    def call(*args: Any, **words: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **words)
        return torch.compiler.disable(function)(*args, **words)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def autocast_state(device: str) -> dict[str, Any]:
    """Arguments of `torch.autocast` for what is on now, for a device of this type; no casts are kept.

    A backward pass runs outside of the block in which the forward pass ran, and evaluates coarse steps itself.
    """
    try:
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    except RuntimeError:  # a device without autocast, as "meta" is
        return {"device_type": "cpu", "enabled": False}
    return {"device_type": device, "dtype": dtype, "enabled": enabled, "cache_enabled": False}


def refuse_transforms(*cotangents: Tensor) -> None:
    """Raise inside a transform of `torch.func`, or where it calls a backward pass.

    Args:
        cotangents: of a backward pass.

    Raises:
        InputError: that names the serial network.
    """
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None or any(map(functorch.is_legacy_batchedtensor, cotangents)):
        raise InputError("parallel layers", "a transform of torch.func (grad, vmap, jvp, ...)", SERIAL)


def is_capturing() -> bool:
    """Whether what is called now becomes part of a CUDA graph: no number can be asked for, and nothing is computed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def gives_numbers(tensor: Tensor) -> bool:
    """Whether Python may ask for a number of a tensor without waiting for a device."""
    return tensor.device.type == "cpu" and not is_capturing()


class _SummedGradient(torch.autograd.Function):
    """The identity, whose gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, mpi: Any) -> Tensor:
        ctx.mpi = mpi
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(ctx.mpi, g), None


def summed_gradient(parameter: Tensor, mpi: Any) -> Tensor:
    """A parameter that is equal on all ranks, whose gradient is the sum over ranks; the backward pass is collective.

    Copies of a module that does so in its `forward` go on doing so; hooks of parameters are not copied.

    Args:
        parameter: of any shape.
        mpi: an mpi4py communicator.
    """
    if mpi.size == 1:
        return parameter
    found: Tensor = _SummedGradient.apply(parameter, mpi)  # type: ignore[no-untyped-call]
    return found


def communicator_name(mpi: Any) -> str:
    """The name by which a communicator can be found in another process: COMM_WORLD or COMM_SELF.

    Raises:
        InputError: one of some of several ranks.
    """
    if mpi.size == 1:
        return "COMM_SELF"
    if MPI.Comm.Compare(mpi, MPI.COMM_WORLD) in (MPI.IDENT, MPI.CONGRUENT):
        return "COMM_WORLD"
    got = f"a communicator of {mpi.size} of {MPI.COMM_WORLD.size} ranks"
    raise InputError("pickle of parallel layers", got, "all ranks or one, or their state_dict()")
