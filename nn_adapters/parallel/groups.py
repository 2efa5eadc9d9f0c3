"""Ranks as a box: those that share the samples, those that share the layers, those that share each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pdeopt.core.errors import InputError


class Groups:
    """A communicator split in three ways, data x layers x domain. Collective.

    Each rank has one place in a box of ranks. Ranks that differ in one place alone are a group: its members share the
    samples of a batch, the layers of a network, or the rows of each image. Neighbors in `domain`, who talk most, are
    neighbors in the communicator, then those in `layers`.

    Args:
        comm: an mpi4py communicator.
        layers: ranks that share the layers; 0 for all that `domain` leaves.
        domain: ranks that share each image.

    Attributes:
        all: the communicator itself.
        data: that of the ranks with samples of their own, for `GradientSums` and the team of `KFAC`.
        layers: for `LayerParallel` and `Pipeline`.
        domain: for `DomainParallel`.
        shape: numbers of ranks, (data, layers, domain).

    Raises:
        InputError: numbers whose product does not divide the ranks.

    Example:
        >>> groups = Groups(MPI.COMM_WORLD, layers=2)
        >>> layers = LayerParallel(groups.layers, lambda: dense(8), 64)
        >>> sums = GradientSums(layers, groups.data)
    """

    def __init__(self, comm: Any, layers: int = 1, domain: int = 1) -> None:
        size = comm.size
        if domain < 1 or size % domain:
            raise InputError("ranks that share an image", domain, f"a number that divides the {size} ranks")
        layers = layers or size // domain
        if layers < 1 or size % (layers * domain):
            legal = f"a number that divides the {size // domain} ranks" + (" that domain leaves" if domain > 1 else "")
            raise InputError("-layer_ranks", layers, legal)
        self.all, self.shape = comm, (size // (layers * domain), layers, domain)
        place = comm.rank // (layers * domain), comm.rank // domain % layers, comm.rank % domain
        self.data, self.layers, self.domain = (self._along(axis, place) for axis in range(3))

    def _along(self, axis: int, place: Sequence[int]) -> Any:
        """The ranks that differ in one place alone."""
        color = 0
        for k, (number, size) in enumerate(zip(place, self.shape)):
            color = color * size + (0 if k == axis else number)
        return self.all.Split(color, self.all.rank)

    def rows(self, batch: Tensor) -> Tensor:
        """The samples of this rank's place in `data`, of a batch that all ranks know, (samples, ...)."""
        return batch[self.data.rank :: self.data.size]
