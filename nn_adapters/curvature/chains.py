"""Layers in parallel as curvature sees them: one after the other, each on the rank that owns it.

The gradient of a network with `LayerParallel` comes from its multigrid. Statistics and forward derivatives go through a
copy of the network that shares all weights, in which a rank runs its layers when the one before has sent their input.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from nn_adapters.layers.blocks import SteppingBlock
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import ParallelModule
from nn_adapters.layers.parts.splines import spline_coefficients
from pdeopt.core.errors import InputError
from pdeopt.steps.exchange.parcels import from_rank, receive, send


class SerialChain(nn.Module):
    """The layers of this rank between those of its neighbors; parameters share the memory of the stacks.

    Called with u_0, which all ranks have, it returns u_N on all. Collective, as are derivatives, forward and backward.

    Args:
        parallel: whose layers.

    Attributes:
        layers: of this rank.
        entries: what it was called with, for backward passes that must not end before they reach it.
    """

    def __init__(self, parallel: LayerParallel) -> None:
        super().__init__()
        self.comm, self.dt = parallel.grid.mpi, parallel.Tf / parallel.num_steps
        self.layers = nn.ModuleList(_layer(parallel, row) for row in range(parallel.grid.end - parallel.grid.begin))
        self.entries: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> SerialChain:
        return self

    def forward(self, u: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            u = u if u.requires_grad else u.detach().requires_grad_()
            self.entries.append(u)
        first = next(self.layers.parameters())
        if forward_ad.unpack_dual(first).tangent is not None and forward_ad.unpack_dual(u).tangent is None:
            u = forward_ad.make_dual(u, torch.zeros_like(u))
        u = _Enter.apply(u, self.comm)
        for layer in self.layers:
            u = layer.step(u, self.dt) if isinstance(layer, SteppingBlock) else torch.add(u, layer(u), alpha=self.dt)
        return _Share.apply(_Leave.apply(u, self.comm), self.comm)  # type: ignore[no-any-return]


def shared_copy(network: nn.Module) -> nn.Module:
    """The network itself, or a copy with the same weights in which layers in parallel are a `SerialChain`.

    Args:
        network: any module.

    Raises:
        InputError: other parts that are solved in parallel, or two of them; weights that are splines.
    """
    parallel = [module for module in network.modules() if isinstance(module, ParallelModule)]
    if not parallel:
        return network
    if len(parallel) > 1 or not isinstance(parallel[0], LayerParallel):
        got = ", ".join(type(module).__name__ for module in parallel)
        raise InputError("parts in parallel of a network with curvature", got, "one LayerParallel")
    if spline_coefficients(parallel[0]):
        raise InputError("weights of a network with curvature", "splines in depth", "weights of each layer")
    memo: dict[int, Any] = {id(each): each for each in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, memo | {id(parallel[0]): SerialChain(parallel[0])})


def chains(network: nn.Module) -> list[SerialChain]:
    """The chains in a copy that `shared_copy` has made; at most one."""
    return [module for module in network.modules() if isinstance(module, SerialChain)]


def gradient_of(p: Tensor) -> Tensor:
    """The gradient of a parameter, in that of its stack where it is a row of one; 0 where there is none."""
    stack, row = getattr(p, "row_of", (None, 0))
    grad = p.grad if stack is None else stack.grad
    if grad is None:
        return torch.zeros_like(p)
    return (grad if stack is None else grad[row]).detach()


def _layer(parallel: LayerParallel, row: int) -> nn.Module:
    """A module whose parameters share the memory of rows of the stacks, and know which."""
    layer = parallel[parallel.grid.begin + row]
    for p, stack in zip(layer.parameters(), parallel.stacks):
        p.row_of = stack, row  # type: ignore[attr-defined]
    return layer


def _from(u: Tensor, comm: Any, root: int) -> Tensor:
    """The tensor of one rank, on all."""
    return u.clone() if comm.size == 1 else from_rank(comm, u, root)


class _Enter(Function):
    """u_0 on the first rank, the states after the rank before on the others."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, comm: Any) -> Tensor:
        ctx.comm = comm
        return u.clone() if comm.rank == 0 else receive(comm, u, comm.rank - 1)

    @staticmethod
    def jvp(ctx: Any, du: Tensor, _: None) -> Tensor:
        return du.clone() if ctx.comm.rank == 0 else receive(ctx.comm, du, ctx.comm.rank - 1)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor, None]:
        if ctx.comm.rank > 0:
            send(ctx.comm, w, ctx.comm.rank - 1)
        return _from(w, ctx.comm, 0), None


class _Leave(Function):
    """The states after this rank's layers, which the next rank receives."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, comm: Any) -> Tensor:
        ctx.comm = comm
        if comm.rank + 1 < comm.size:
            send(comm, u, comm.rank + 1)
        return u.clone()

    @staticmethod
    def jvp(ctx: Any, du: Tensor, _: None) -> Tensor:
        if ctx.comm.rank + 1 < ctx.comm.size:
            send(ctx.comm, du, ctx.comm.rank + 1)
        return du.clone()

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor, None]:
        last = ctx.comm.rank + 1 == ctx.comm.size
        return (w.clone() if last else receive(ctx.comm, w, ctx.comm.rank + 1)), None


class _Share(Function):
    """The states after the last rank's layers, on all; their cotangents are equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, comm: Any) -> Tensor:
        ctx.comm = comm
        return _from(u, comm, comm.size - 1)

    @staticmethod
    def jvp(ctx: Any, du: Tensor, _: None) -> Tensor:
        return _from(du, ctx.comm, ctx.comm.size - 1)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor, None]:
        return w.clone(), None
