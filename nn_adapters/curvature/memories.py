"""What second-order optimizers remember, of all ranks together: for files, and for another number of ranks."""

from __future__ import annotations

from typing import Any

from nn_adapters.curvature.secondorder import SecondOrder
from pdeopt.core.errors import InputError


def whole_memory(optimizer: SecondOrder, comm: Any) -> dict[str, Any]:
    """The memories of all ranks on the first of them, "RANK.NAME" each; nothing elsewhere. Collective.

    Args:
        optimizer: on each rank.
        comm: mpi4py communicator of all ranks of the run.
    """
    own, found = optimizer.memory(), dict[str, Any]()
    for name in sorted({name for names in comm.allgather(list(own)) for name in names}):
        values = comm.gather(own.get(name)) or []  # a message each: factors are large
        found |= {f"{rank}.{name}": each for rank, each in enumerate(values) if each is not None}
    return found


def recall_whole(optimizer: SecondOrder, memory: dict[str, Any], comm: Any) -> None:
    """Go on from a `whole_memory` that all ranks have: to the last bit on as many ranks; to rounding on others.

    On others, the factors of all ranks come to those that own their layers now; what rounding took from messages is
    lost, and sampled targets go on as those of one of the ranks.

    Args:
        optimizer: on each rank.
        memory: on every rank.
        comm: mpi4py communicator of all ranks of the run.

    Raises:
        InputError: what no such optimizer wrote; layers in parallel, which were on another number of ranks.
    """
    numbers = [name.partition(".")[0] for name in memory]
    ranks = 1 + max(map(int, numbers)) if numbers and all(map(str.isdecimal, numbers)) else 0
    if ranks < 1 or (ranks != comm.size and optimizer.model.chain is not None):
        raise InputError(f"memory of {type(optimizer).__name__}", f"that of {ranks} ranks", f"that of {comm.size}")
    by_rank: list[dict[str, Any]] = [{} for _ in range(ranks)]
    for name, value in memory.items():
        rank, _, rest = name.partition(".")
        by_rank[int(rank)][rest] = value
    own = by_rank[comm.rank % ranks]
    if ranks != comm.size:
        factors = {name: each for part in by_rank for name, each in part.items()}
        own = {name: each for name, each in (factors | own).items() if not name.startswith("lost.")}
    try:
        optimizer.recall(own)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        got, legal = f"one that does not fit ({type(error).__name__}: {error})", "what such an optimizer wrote"
        raise InputError(f"memory of {type(optimizer).__name__}", got, legal) from error
