"""Where points are evaluated, and the two ways between that device and the host, which has the parameters.

Methods that find parameters stay on the host, in double precision: vectors of weights are short. Points, jets,
features, lifts, factors and given numbers lie on the device. An evaluation sends the parameters there, `across`, once,
and takes what it found `home`, once: nothing between waits for the device, or mixes its tensors with those of the host.
"""

from __future__ import annotations

import os
from textwrap import shorten

import torch
from mpi4py import MPI
from torch import Tensor

from pdeopt.core.errors import InputError

HOST = torch.device("cpu")

#: Variables in which Open MPI, MPICH and Slurm tell a process its number on its machine.
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


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


def across(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on the device: the same tensor where that is the host."""
    return numbers if device.type == "cpu" else numbers.to(device)


def home(found: Tensor) -> Tensor:
    """What was found on a device, on the host: the same tensor where it was found there. It waits for the device."""
    return found.cpu()
