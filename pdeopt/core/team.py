"""Ranks that share work among them: MPI's, or a process group of torch.distributed; and the device of each.

What a decomposition or an optimizer asks of its `team` is little: rank, size, and five collective calls, named as
mpi4py names them. So any mpi4py communicator is a team; `TorchTeam` makes one of a process group.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from textwrap import shorten
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI

from pdeopt.core.errors import InputError

BACKENDS = ("mpi", "gloo", "nccl")

#: Variables in which Open MPI, MPICH and Slurm tell a process its number on its machine.
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


class Team(Protocol):
    """Ranks that work together."""

    @property
    def rank(self) -> int:
        """The number of this process among them."""

    @property
    def size(self) -> int:
        """How many they are."""

    def allreduce(self, own: Any) -> Any:
        """The sum of all ranks' numbers, or arrays of one shape."""

    def allgather(self, own: Any) -> list[Any]:
        """All ranks' objects, in order."""

    def bcast(self, own: Any, root: int = 0) -> Any:
        """The object of one rank."""

    def Barrier(self) -> None:
        """Wait for all."""


class TorchTeam:
    """A process group of torch.distributed as a team.

    Args:
        group: of the initialized back end; None for all processes. With nccl, messages go through the current GPU.
    """

    def __init__(self, group: Any = None) -> None:
        if not dist.is_initialized():
            raise InputError("torch.distributed", "not initialized", "init_process_group first, or team_of('gloo')")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"

    def allreduce(self, own: Any) -> Any:
        """The sum of all ranks' numbers, or arrays of one shape."""
        array = np.array(own)
        total = torch.from_numpy(np.atleast_1d(array)).to(self._device)
        dist.all_reduce(total, group=self.group)
        found = total.cpu().numpy().reshape(array.shape)
        return found if isinstance(own, np.ndarray) else found.item()

    def allgather(self, own: Any) -> list[Any]:
        """All ranks' objects, in order."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self.group)
        return found

    def bcast(self, own: Any, root: int = 0) -> Any:
        """The object of one rank."""
        box = [own]
        source = root if self.group is None else dist.get_global_rank(self.group, root)
        dist.broadcast_object_list(box, src=source, group=self.group)
        return box[0]

    def alltoall(self, own: torch.Tensor, sizes: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Bytes in a row, `sizes` of them for each rank, for those that the ranks have for this one, `lengths`."""
        received = torch.empty(sum(lengths), dtype=own.dtype, device=self._device)
        dist.all_to_all_single(received, own.to(self._device), list(lengths), list(sizes), group=self.group)
        return received.cpu()

    def Barrier(self) -> None:
        """Wait for all."""
        dist.barrier(group=self.group)


def team_of(backend: str = "mpi") -> Team:
    """All processes of this run.

    Args:
        backend: "mpi" under mpiexec; "gloo" or "nccl" under torchrun, or wherever its variables RANK, WORLD_SIZE,
            MASTER_ADDR and MASTER_PORT are set.
    """
    if backend not in BACKENDS:
        raise InputError("back end", backend, " | ".join(BACKENDS))
    if backend == "mpi":
        return MPI.COMM_WORLD
    if not dist.is_available() or (backend == "nccl" and not dist.is_nccl_available()):
        raise InputError("back end", f"{backend}, which this PyTorch is without", "mpi, or another build of PyTorch")
    if not dist.is_initialized():
        dist.init_process_group(backend)
    return TorchTeam()


def checked_device(device: str | torch.device) -> torch.device:
    """A device by its name, such as "cpu", "cuda" or "cuda:1".

    The plain "cuda" is PyTorch's current one. Under `mpiexec` it is the rank's own: ranks of a node take its GPUs in
    turn, as PETSc's do.

    Raises:
        InputError: one that is not there, or that has no numbers of double precision.
    """
    try:
        place = torch.device(device)
        if str(place) == "cuda" and MPI.COMM_WORLD.size > 1:
            place = torch.device("cuda", _rank_on_node() % max(torch.cuda.device_count(), 1))
        zero = torch.zeros(1, dtype=torch.float64, device=place)
        float(zero.sum())
    except (AssertionError, RuntimeError, TypeError) as error:  # not built, not there, of single precision alone
        why = shorten(str(error), 80, placeholder=" ...").rstrip(".")
        legal = " | ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise InputError("device", f"{device} ({why})", f"{legal}, as this PyTorch finds here") from None
    return zero.device


def _rank_on_node() -> int:
    """Among the ranks of this machine, as whoever started them says; else that among all. No message is sent for it."""
    said = (os.environ.get(name, "") for name in LOCAL_RANKS)
    return next((int(word) for word in said if word.isdecimal()), MPI.COMM_WORLD.rank)
