"""Data parallel x layer parallel: ranks in groups that share the layers; the groups share each batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdeopt.core.errors import InputError


class RankGroups:
    """A communicator split into groups of ranks. Collective.

    Args:
        comm: an mpi4py communicator.
        layer_ranks: ranks of a group; 0 for one group of all.

    Attributes:
        all: the communicator itself.
        layers: the communicator of this rank's group, for `LayerParallel`.
        data: that of the ranks with the same place in their groups, over which gradients are averaged.

    Raises:
        InputError: a number that does not divide the ranks.
    """

    def __init__(self, comm: Any, layer_ranks: int = 0) -> None:
        self.all, size = comm, layer_ranks or comm.size
        if comm.size % size:
            raise InputError("-layer_ranks", layer_ranks, f"a number that divides the {comm.size} ranks")
        self.layers = comm.Split(comm.rank // size, comm.rank)
        self.data = comm.Split(comm.rank % size, comm.rank)

    def average(self, gradients: list[Tensor]) -> None:
        """Replace gradients by their mean over the groups, in one message. Collective."""
        if self.data.size == 1 or not gradients:
            return
        flat = torch.cat([g.reshape(-1) for g in gradients]).cpu()
        total = torch.empty_like(flat)
        self.data.Allreduce(flat.numpy(), total.numpy())
        parts = (total / self.data.size).split([g.numel() for g in gradients])
        for g, part in zip(gradients, parts):
            g.copy_(part.reshape(g.shape))
