"""Gated recurrent units whose sequence is solved in parallel: time steps are steps, one set of weights serves all.

    r = sigma(W_r x + U_r h), z = sigma(W_z x + U_z h), n = tanh(W_n x + r (U_n h))   (with biases)
    classic:   h_t = n + z^dt (h_{t-1} - n)                        dt = 1 is PyTorch's GRU
    implicit:  (1 + dt (1 - z)) h_t = h_{t-1} + dt (1 - z) n

Both are stable for every dt, so coarse steps make sense: |h| stays below 1. The implicit unit is that of G. E. Moon,
E. C. Cyr, Parallel training of GRU networks with a multi-grid solver for long sequences, ICLR 2022. A long step of the
classic one is dt steps of PyTorch's with the gates held, in one; Euler's h + dt (1 - z) (n - h) would grow without
bound where dt (1 - z) > 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from nn_adapters.layers.layer_mgrit import LayerMgrit, solve_layers
from nn_adapters.layers.layerstep import AutogradStep, StepLength
from nn_adapters.layers.parallelmodule import ParallelModule
from pdeopt.core.errors import InputError
from pdeopt.steps.mgrit import MgritSettings


class GRUParallel(ParallelModule):
    """Stacked GRUs whose sequence of `num_steps` is solved by MGRIT; parameters are named as those of `nn.GRU`.

    Called with whole sequences (batch, num_steps, input_size), equal on all ranks, it returns the last hidden state of
    the last layer, (batch, hidden_size), equal on all ranks. Collective over `comm`, and so is the backward pass. A
    rank works on its part of the steps; parameters and their gradients are equal on all ranks, so that any optimizer
    will do. Gates of the inputs are found once, outside of the cycles.

    Source: G. E. Moon, E. C. Cyr, Parallel training of GRU networks with a multi-grid solver for long sequences,
    ICLR 2022; the solver is that of `LayerParallel`.

    Args:
        comm: an mpi4py or PETSc communicator; None for this process alone.
        input_size: features of a step of the sequence.
        hidden_size: of a layer's state.
        num_steps: length of the sequences.
        num_layers: GRUs, one on top of the other.
        kind: "implicit", stable on coarse levels, or "classic", the unit of PyTorch.
        settings: of MGRIT; keywords replace single ones. By default three levels and a coarsening factor of 4.

    Raises:
        InputError: another kind, coarsening factors that are not legal, more ranks than intervals; when called,
            sequences of another shape.

    Example:
        >>> gru = GRUParallel(MPI.COMM_WORLD, input_size=9, hidden_size=32, num_steps=128)
        >>> head = nn.Linear(32, 6)
        >>> nn.functional.cross_entropy(head(gru(x)), labels).backward()  # x (batch, 128, 9)
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
        if kind not in GRU_STEPS:
            raise InputError("kind of GRU", kind, " | ".join(GRU_STEPS))
        self.kind, self.hidden_size, self.num_layers, self.num_steps = kind, hidden_size, num_layers, num_steps
        settings = settings or MgritSettings(**{"coarsening": "4", "levels": 3, **words})
        comm = MPI.COMM_SELF if comm is None else comm
        self.solvers = [LayerMgrit(num_steps, float(num_steps), comm, settings) for _ in range(num_layers)]
        self.grid = self.solvers[0].grid
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
        """As `forward`, from the inputs of this rank's steps, (n_local, batch, input), as an encoder makes them."""
        hidden = rows.new_zeros((rows.shape[1], self.hidden_size))
        end = hidden
        for layer, solver in enumerate(self.solvers):
            gates, shared = self._gates_and_shared(layer, rows)
            more = layer < self.num_layers - 1
            end, rows = solve_layers(solver, AutogradStep(GRU_STEPS[self.kind]), hidden, [gates], shared, more)
        return end

    def _gates_and_shared(self, layer: int, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """W x + b of all steps at once, (steps, batch, 3 hidden), and U and c."""
        names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
        W, b, U, c = (getattr(self, f"{name}_l{layer}") for name in names)
        return torch.nn.functional.linear(rows, W, b), [U, c]

    def forward_in_series(self, x: Tensor) -> Tensor:
        """As `forward`, one step after the other on this process, by PyTorch's operations alone."""
        rows = x.transpose(0, 1)
        for layer in range(self.num_layers):
            gates, shared = self._gates_and_shared(layer, rows)
            h, states = x.new_zeros((1, len(x), self.hidden_size)), []
            for i in range(len(rows)):
                h = GRU_STEPS[self.kind](h, (gates[i : i + 1],), shared, 1.0)
                states.append(h)
            rows = torch.cat(states)
        return rows[-1]

    def extra_repr(self) -> str:
        return f"{self.kind}, hidden_size={self.hidden_size}, num_layers={self.num_layers}, num_steps={self.num_steps}"


def sum_gradient_over_ranks(parameter: nn.Parameter, mpi: Any) -> None:
    """Make the gradient of a parameter the sum over ranks, from now on.

    For modules that act on the steps of their rank alone, as encoders before `GRUParallel.from_rows` do.

    Args:
        parameter: equal on all ranks.
        mpi: the communicator, `network.grid.mpi`. The backward pass is then collective over it.
    """

    def total(gradient: Tensor) -> Tensor:
        buffer = gradient.detach().cpu().contiguous()
        result = torch.empty_like(buffer)
        mpi.Allreduce(buffer.numpy(), result.numpy())
        return result.to(gradient.device)

    if mpi.size > 1:
        parameter.register_hook(total)


def _gates(h: Tensor, z: Sequence[Tensor], p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The logit of 1 - z, and n."""
    U, c = p
    x_r, x_z, x_n = z[0].chunk(3, -1)
    h_r, h_z, h_n = torch.nn.functional.linear(h, U, c).chunk(3, -1)
    return -x_z - h_z, torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)


def _column(dt: StepLength, like: Tensor) -> StepLength:
    return dt if isinstance(dt, float) else dt.to(like).reshape(-1, 1, 1)


def classic_step(h: Tensor, z: Sequence[Tensor], p: Sequence[Tensor], dt: StepLength) -> Tensor:
    """n + z^dt (h - n): dt = 1 is PyTorch's GRU; a longer step is dt of them, the gates held, and stable.

    Args:
        h: hidden states before the steps, (steps, batch, hidden).
        z: the gates of the inputs, W x + b, (steps, batch, 3 hidden), in a sequence of one.
        p: U, (3 hidden, hidden), and its bias, (3 hidden,).
        dt: length of the steps.
    """
    logit, n = _gates(h, z, p)
    if isinstance(dt, float) and dt == 1.0:
        return h + torch.sigmoid(logit) * (n - h)
    keep = -torch.expm1(_column(dt, h) * torch.nn.functional.logsigmoid(-logit))  # 1 - z^dt
    return h + keep * (n - h)


def implicit_step(h: Tensor, z: Sequence[Tensor], p: Sequence[Tensor], dt: StepLength) -> Tensor:
    """(h + dt (1 - z) n) / (1 + dt (1 - z)): implicit in h, with gates at the old state, stable for every dt.

    Moon, Cyr, 2022; arguments as for `classic_step`.
    """
    logit, n = _gates(h, z, p)
    d = torch.sigmoid(logit) * _column(dt, h)
    return (h + d * n) / (1.0 + d)


#: Steps of a GRU by its kind.
GRU_STEPS = {"implicit": implicit_step, "classic": classic_step}
