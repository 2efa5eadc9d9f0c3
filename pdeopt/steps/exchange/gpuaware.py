"""Whether MPI takes the memory of a GPU: as its library says, or as an option does."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

from mpi4py import MPI

from pdeopt.core.settings import Settings, read, setting

#: CUDA among the kinds of memory that `MPIX_GPU_query_support` of MPICH knows (its mpi.h).
MPIX_GPU_SUPPORT_CUDA = 0


@dataclass(frozen=True)
class MessageSettings(Settings):
    """Messages of tensors on a GPU."""

    use_gpu_aware_mpi: bool | None = setting(
        None, "MPI gets the memory of the GPU itself; by default where its library says that it may", kind=bool
    )


def takes_gpu_memory() -> bool:
    """Whether messages of tensors on a GPU are to be in its memory.

    The option is that of PETSc, `-use_gpu_aware_mpi 0 | 1`, and has the last word: some libraries take device memory
    and do not say so. One that does not take it, and is given it, ends in a segmentation fault or worse. Ranks may
    differ: a message does not know in which memory it began, and one of the host may be received on a device.

    Raises:
        InputError: another word for the option.
    """
    chosen = read(MessageSettings).use_gpu_aware_mpi
    return is_gpu_aware() if chosen is None else chosen


@cache
def is_gpu_aware() -> bool:
    """Whether the MPI that mpi4py is linked to says that it takes memory of CUDA."""
    return says_so(ctypes.CDLL(MPI.__file__))  # what mpi4py is linked to is found through it


def says_so(library: Any) -> bool:
    """The answer of a library; one that cannot be asked takes no such memory.

    MPICH, from 4.0 on, has `MPIX_GPU_query_support`, which heeds MPIR_CVAR_ENABLE_GPU. Open MPI has
    `MPIX_Query_cuda_support`, which in version 4 says what was compiled and not what is turned off, as conda's is
    unless OMPI_MCA_opal_cuda_support is true: that is the variable of the library, which version 4 shows.

    Args:
        library: as ctypes loads it.
    """
    of_mpich = getattr(library, "MPIX_GPU_query_support", None)
    if of_mpich is not None:
        answer = ctypes.c_int(0)
        return bool(of_mpich(MPIX_GPU_SUPPORT_CUDA, ctypes.byref(answer)) == MPI.SUCCESS and answer.value == 1)
    of_open_mpi = getattr(library, "MPIX_Query_cuda_support", None)
    return of_open_mpi is not None and bool(of_open_mpi() == 1) and _is_turned_on(library)


def _is_turned_on(library: Any) -> bool:
    try:
        return bool(ctypes.c_bool.in_dll(library, "opal_cuda_support").value)
    except ValueError:  # no such variable
        return True
