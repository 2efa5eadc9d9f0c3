"""Gated recurrent units whose sequence is solved in parallel: time steps are steps, one set of weights serves all.

    r = sigma(W_r x + U_r h), z = sigma(W_z x + U_z h), n = tanh(W_n x + r (U_n h))   (with biases)
    classic:   h_t = h_{t-1} + dt (1 - z) (n - h_{t-1})            dt = 1 is PyTorch's GRU
    implicit:  (1 + dt (1 - z)) h_t = h_{t-1} + dt (1 - z) n

The implicit unit is stable for every dt, so coarse steps make sense (G. E. Moon, E. C. Cyr, Parallel training of GRU
networks with a multi-grid solver for long sequences, ICLR 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from nn_adapters.layers.densestep import add
from nn_adapters.layers.layer_mgrit import Hierarchy, Propagation
from pdeopt.core.errors import InputError
from pdeopt.steps.mgrit import MgritSettings


class GRUParallel(nn.Module):
    """Stacked GRUs over sequences of `num_steps`; the parameters are named as those of `nn.GRU`.

    Under MPI every rank gives the whole sequences and works on its part of them; parameters and their gradients are
    equal on all ranks.

    Args:
        comm: an mpi4py or PETSc communicator; None for this process alone.
        input_size, hidden_size, num_steps, num_layers: sizes.
        kind: "implicit" or "classic".
        settings: of MGRIT; keywords replace single ones.
    """

    def __init__(
        self,
        comm: Any,
        input_size: int,
        hidden_size: int,
        num_steps: int,
        num_layers: int = 1,
        kind: str = "implicit",
        settings: MgritSettings | None = None,
        **words: Any,
    ) -> None:
        super().__init__()
        if kind not in STEPS:
            raise InputError("kind of GRU", kind, " | ".join(STEPS))
        self.kind, self.hidden_size, self.num_layers, self.num_steps = kind, hidden_size, num_layers, num_steps
        settings = settings or MgritSettings(**{"coarsening": "4", "levels": 3, **words})
        comm = MPI.COMM_SELF if comm is None else comm
        self.hierarchies = [Hierarchy(num_steps, float(num_steps), comm, settings) for _ in range(num_layers)]
        self.grid = self.hierarchies[0].grid
        bound = 1.0 / math.sqrt(hidden_size)
        for layer in range(num_layers):
            sizes = (input_size if layer == 0 else hidden_size, hidden_size)
            for name, size in zip(("ih", "hh"), sizes):
                weight = nn.Parameter(torch.empty(3 * hidden_size, size).uniform_(-bound, bound))
                bias = nn.Parameter(torch.empty(3 * hidden_size).uniform_(-bound, bound))
                self.register_parameter(f"weight_{name}_l{layer}", weight)
                self.register_parameter(f"bias_{name}_l{layer}", bias)
            for name in ("weight_ih", "bias_ih"):  # each rank sees its steps only
                sum_gradient_over_ranks(getattr(self, f"{name}_l{layer}"), self.grid.mpi)

    def forward(self, x: Tensor) -> Tensor:
        """The last hidden state of the last layer, (batch, hidden), of sequences (batch, steps, input). Collective."""
        if x.dim() != 3 or x.shape[1] != self.num_steps:
            raise InputError("sequences", tuple(x.shape), f"(batch, {self.num_steps}, input)")
        rows = x[:, self.grid.begin : self.grid.end].transpose(0, 1)
        return self.from_rows(rows)

    def from_rows(self, rows: Tensor) -> Tensor:
        """As `forward`, of the inputs of this rank's steps, (n_local, batch, input): encoders work on these alone."""
        hidden = rows.new_zeros((rows.shape[1], self.hidden_size))
        end = hidden
        for layer, hierarchy in enumerate(self.hierarchies):
            names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
            W, b, U, c = (getattr(self, f"{name}_l{layer}") for name in names)
            gates = torch.nn.functional.linear(rows, W, b)  # of all steps at once
            more = layer < self.num_layers - 1
            end, states = Propagation.apply(hierarchy, STEPS[self.kind], more, 1, hidden, gates, U, c)  # type: ignore[no-untyped-call]
            rows = states
        return end  # type: ignore[no-any-return]

    def serial(self, x: Tensor) -> Tensor:
        """As `forward`, one step after the other on this process, by PyTorch's operations alone."""
        rows = x.transpose(0, 1)
        for layer in range(self.num_layers):
            names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
            W, b, U, c = (getattr(self, f"{name}_l{layer}") for name in names)
            gates = torch.nn.functional.linear(rows, W, b)
            h, states = x.new_zeros((1, len(x), self.hidden_size)), []
            for i in range(len(rows)):
                h = STEPS[self.kind](h, (gates[i : i + 1],), (U, c), 1.0)
                states.append(h)
            rows = torch.cat(states)
        return rows[-1]

    def extra_repr(self) -> str:
        return f"{self.kind}, hidden_size={self.hidden_size}, num_layers={self.num_layers}, num_steps={self.num_steps}"


def sum_gradient_over_ranks(parameter: nn.Parameter, mpi: Any) -> None:
    """Make the gradient of a parameter the sum over ranks: for what acts on the steps of a rank, as encoders do."""

    def total(gradient: Tensor) -> Tensor:
        buffer = gradient.detach().cpu().contiguous()
        result = torch.empty_like(buffer)
        mpi.Allreduce(buffer.numpy(), result.numpy())
        return result.to(gradient.device)

    if mpi.size > 1:
        parameter.register_hook(total)


def _gates(h: Tensor, z: Sequence[Tensor], p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """1 - z and n."""
    U, c = p
    x_r, x_z, x_n = z[0].chunk(3, -1)
    h_r, h_z, h_n = torch.nn.functional.linear(h, U, c).chunk(3, -1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return torch.sigmoid(-x_z - h_z), n


def _scale(keep: Tensor, dt: Any) -> Tensor:
    return keep * (dt if isinstance(dt, float) else dt.to(keep).reshape(-1, 1, 1))


def classic(h: Tensor, z: Sequence[Tensor], p: Sequence[Tensor], dt: Any) -> Tensor:
    """h + dt (1 - z) (n - h)."""
    keep, n = _gates(h, z, p)
    return add(h, keep * (n - h), dt)


def implicit(h: Tensor, z: Sequence[Tensor], p: Sequence[Tensor], dt: Any) -> Tensor:
    """(h + dt (1 - z) n) / (1 + dt (1 - z))."""
    keep, n = _gates(h, z, p)
    d = _scale(keep, dt)
    return (h + d * n) / (1.0 + d)


STEPS = {"implicit": implicit, "classic": classic}
