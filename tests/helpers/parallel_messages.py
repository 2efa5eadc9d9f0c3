"""Messages of tensors of the host, and as if of a GPU: `python -m tests.helpers.parallel_messages`.

Under mpiexec each rank compares what comes with what the ranks are known to have sent, bit by bit. Where a tensor
stands for one on a GPU, mpi4py gets the tensor itself, through DLPack, as it would get one on a device.
"""

import itertools
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from nn_adapters.layers.blocks import dense
from nn_adapters.layers.layerparallel import LayerParallel
from pdeopt.core import messages
from pdeopt.steps.exchange import parcels
from pdeopt.steps.exchange.neighbors import Neighbors
from pdeopt.steps.transfer import Move

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
#: Which ranks send and receive in the memory of a GPU.
MODES = [lambda rank: False, lambda rank: True, lambda rank: rank % 2 == 0]
OPTION = "use_gpu_aware_mpi"


@contextmanager
def as_if_on_a_gpu(on=True):
    """Inside, tensors stand for ones on a GPU, whose stream has nothing to do; MPI takes its memory."""
    if not on:
        yield
        return
    PETSc.Options().setValue(OPTION, "1")
    try:
        with patch.object(parcels, "_on_gpu", lambda tensor: True), patch.object(parcels, "_ready", lambda t: t):
            yield
    finally:
        PETSc.Options().delValue(OPTION)


@contextmanager
def counts_up_to(most):
    """Inside, MPI counts no further, and larger messages are in blocks."""
    if most is None:
        yield
        return
    with ExitStack() as stack:
        for module, name, value in ((messages, "LARGEST", most), (messages, "_BLOCK", 3), (parcels, "LARGEST", most)):
            stack.enter_context(patch.object(module, name, value))
        messages._type_of.cache_clear()
        yield
    messages._type_of.cache_clear()


def row(rank, dtype, size=7):
    """What a rank has: small whole numbers, which all types hold and whose sums do, too."""
    return (torch.arange(size) * 3 + 5 * rank).remainder(11).to(dtype).reshape(1, -1).T  # not in one row


def same(found, wanted):
    assert found.dtype == wanted.dtype and torch.equal(found, wanted), (found, wanted)


def check(mpi, dtype):
    """All kinds of messages of a type."""
    rank, ranks = mpi.rank, mpi.size
    own, neighbors = row(rank, dtype), Neighbors(mpi)
    for toward, size in itertools.product((1, -1), (7, 0)):
        came = neighbors.exchange(row(rank, dtype, size), toward)
        if 0 <= rank - toward < ranks and ranks > 1:
            same(came, row(rank - toward, dtype, size))
        else:
            assert came is None
    came = neighbors.receive_before(own)  # from rank to rank
    neighbors.send_after(own if came is None else came)
    same(own if came is None else came, row(0, dtype))
    came = neighbors.receive_after(own)
    neighbors.send_before(own if came is None else came)
    same(own if came is None else came, row(ranks - 1, dtype))
    for root in range(ranks):
        same(parcels.from_rank(mpi, own, root), row(root, dtype))
        same(own, row(rank, dtype))
    same(parcels.from_rank(mpi, own[:0], 0), own[:0])
    check_move(mpi, dtype)
    if dtype != torch.bool:
        total = sum(row(each, torch.float64) for each in range(ranks)).to(dtype)
        same(parcels.sum_over_ranks(mpi, own), total)
        same(own, row(rank, dtype))


def check_move(mpi, dtype):
    """Rows of steps to the first rank and to other shares, and back."""
    steps = 3 * mpi.size + 1
    whole = torch.arange(2 * steps).remainder(13).reshape(steps, 2).to(dtype)
    offsets = np.linspace(0, steps, mpi.size + 1).astype(int)
    for target in (np.r_[0, np.full(mpi.size, steps)], np.maximum(offsets - 1, 0) + (offsets == steps)):
        move, mine = Move(mpi, offsets, target), slice(*offsets[mpi.rank : mpi.rank + 2])
        (moved,) = move.there([whole[mine]])
        same(moved, whole[target[mpi.rank] : target[mpi.rank + 1]])
        same(move.back(moved), whole[mine])


def check_pieces(mpi):
    """All to all of unlike pieces, and sums in parts."""
    rank, ranks = mpi.rank, mpi.size
    pieces = [torch.full(((2 * rank + to) % 4,), 10 * rank + to, dtype=torch.uint8) for to in range(ranks)]
    lengths = [(2 * each + rank) % 4 for each in range(ranks)]
    for most in (messages.LARGEST, messages.LARGEST + 1):
        for each, came in enumerate(messages.exchange(mpi, pieces, lengths, most).finish()):
            same(came, torch.full((lengths[each],), 10 * each + rank, dtype=torch.uint8))
    sums = messages.Messages(mpi, 9, "float64")
    same(sums.sum(row(rank, torch.float64, 9)[:, 0]), sum(row(each, torch.float64, 9)[:, 0] for each in range(ranks)))


def network(mpi):
    """Features, loss and gradients of a network whose layers are on all ranks."""
    torch.manual_seed(0)
    layers = LayerParallel(mpi, lambda: dense(4), 16, 1.0, coarsening="2", levels=3, adjoint_cycles=1)
    x = torch.randn(5, 4, requires_grad=True)
    value = layers(x)
    value.square().sum().backward()
    return [value.detach(), x.grad, *(p.grad for p in layers.parameters())]


def main(mpi):
    """All modes, types and kinds; what a network finds is the same in all modes."""
    networks = []
    for direct, most in itertools.product(MODES, (None, 5)):
        with as_if_on_a_gpu(direct(mpi.rank)), counts_up_to(most):
            for dtype in DTYPES:
                check(mpi, dtype)
            check_pieces(mpi)
            networks.append(network(mpi))
    for found in networks[1:]:
        for a, b in zip(found, networks[0], strict=True):
            same(a, b)


if __name__ == "__main__":
    main(MPI.COMM_WORLD)
