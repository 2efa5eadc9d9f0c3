"""How a tensor becomes a message: the one place that knows in which memory it travels.

Tensors of the host are sent as they are. Those of a GPU go through page-locked memory of the host, or, where MPI takes
it, in the memory of the GPU (`gpuaware`), without a copy. Messages are bytes, so that they have any dtype, bfloat16 and
bool too; only sums have numbers.

MPI knows nothing of the streams of a GPU: before it reads or writes memory there, the kernels that are under way must
be through, those that write what is sent, and those that still read what the memory of a new tensor was before. So the
stream is waited for before each message, to send or to receive (mpi4py's demo/cuda-aware-mpi/use_cupy.py: "always make
sure the GPU buffer is ready before any MPI operation"). Afterwards nothing is needed: a receive returns when the bytes
are there, and kernels that are launched then see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.messages import LARGEST, whole_message
from pdeopt.steps.exchange.gpuaware import takes_gpu_memory


def outgoing(tensor: Tensor) -> Tensor:
    """A tensor where MPI reads it, contiguous: the same memory, if it is so there.

    Args:
        tensor: of any shape, on any device.
    """
    tensor = tensor.detach()
    if not _on_gpu(tensor):
        return tensor.cpu().contiguous()
    if takes_gpu_memory():
        return _ready(tensor.contiguous())
    return _of_host(tensor, tensor.shape).copy_(tensor)


def incoming(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Memory in which MPI writes what is to come.

    Args:
        like: has its dtype, and is on the device that it is for.
        shape: of what comes; by default that of `like`.
    """
    shape = like.shape if shape is None else shape
    if _on_gpu(like) and takes_gpu_memory():
        return _ready(torch.empty(shape, dtype=like.dtype, device=like.device))
    return _of_host(like, shape)


def arrived(tensor: Tensor, like: Tensor) -> Tensor:
    """What came in memory of `incoming`, on the device of `like`."""
    return tensor.to(like.device, non_blocking=True)


def as_message(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor, of `outgoing` or `incoming`, as mpi4py takes them; it shares their memory."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return whole_message(flat if _on_gpu(flat) else flat.numpy())


def send(mpi: Any, tensor: Tensor, rank: int) -> None:
    """Send a tensor to a rank that waits for it with `receive`."""
    mpi.Send(as_message(outgoing(tensor)), rank)


def receive(mpi: Any, like: Tensor, rank: int) -> Tensor:
    """The tensor that a rank sends, of the shape, dtype and device of `like`."""
    found = incoming(like)
    mpi.Recv(as_message(found), rank)
    return arrived(found, like)


def from_rank(mpi: Any, tensor: Tensor, root: int) -> Tensor:
    """The tensor of one rank on all; its shape and dtype are the same everywhere. Collective.

    Returns:
        a tensor of its own; that which was given, where there is nothing to send.
    """
    if mpi.size == 1 or tensor.numel() == 0:
        return tensor
    is_root = mpi.rank == root
    found = outgoing(tensor) if is_root else incoming(tensor)
    mpi.Bcast(as_message(found), root)
    return tensor.detach().clone(memory_format=torch.contiguous_format) if is_root else arrived(found, tensor)


def sum_over_ranks(mpi: Any, tensor: Tensor) -> Tensor:
    """The sum of tensors of equal shape over ranks, in their dtype; half precision is added up in single. Collective.

    Args:
        mpi: an mpi4py communicator.
        tensor: of any shape, on any device.
    """
    if mpi.size == 1:
        return tensor
    numbers = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
    own, found = outgoing(numbers), incoming(numbers)
    for part, total in zip(_counted(own), _counted(found)):
        mpi.Allreduce(part, total)
    return found.to(tensor)


def _counted(tensor: Tensor) -> list[Any]:
    """The numbers of a contiguous tensor as mpi4py takes them, in parts that a count of MPI can say."""
    parts = [tensor] if tensor.numel() <= LARGEST else tensor.reshape(-1).split(LARGEST)
    return [part if _on_gpu(part) else part.numpy() for part in parts]


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _of_host(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory of the host, which a GPU reads and writes at the speed of its bus."""
    return torch.empty(shape, dtype=like.dtype, pin_memory=_on_gpu(like))


def _ready(tensor: Tensor) -> Tensor:
    """The tensor, when its stream has come to an end."""
    torch.cuda.current_stream(tensor.device).synchronize()
    return tensor
