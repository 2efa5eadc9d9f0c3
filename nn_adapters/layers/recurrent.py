"""Gated recurrent units whose sequence is solved in parallel: time steps are steps, one set of weights serves all.

    r = sigma(W_r x + U_r h), z = sigma(W_z x + U_z h), n = tanh(W_n x + r (U_n h))   (with biases)
    classic:   h_t = n + z^dt (h_{t-1} - n)                        dt = 1 is PyTorch's GRU
    implicit:  h_t = n + (1 + (1 - z))^-dt (h_{t-1} - n)           dt = 1 is (2 - z) h_t = h_{t-1} + (1 - z) n

A long step is that many short ones with the gates held, exactly, in one; so coarse steps are stable, and |h| stays
below 1. Gates are held as they are at the state halfway, which a first stage finds. The implicit unit is that of G. E.
Moon, E. C. Cyr, Parallel training of GRU networks with a multi-grid solver for long sequences, ICLR 2022, whose long
step is one implicit step, (1 + dt (1 - z)) h_t = h_{t-1} + dt (1 - z) n. The classic unit's is often taken as Euler's,
h + dt (1 - z) (n - h), which grows without bound where dt (1 - z) > 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from mpi4py import MPI
from torch import Tensor, nn

from nn_adapters.layers.coarsening import half_way
from nn_adapters.layers.layer_mgrit import LayerMgrit
from nn_adapters.layers.layersolve import solve_layers
from nn_adapters.layers.parallelmodule import ParallelModule
from nn_adapters.layers.parts.context import autocast_state, sum_over_ranks, summed_gradient
from nn_adapters.layers.parts.grugates import GRU_STEPS, kept, long_step
from nn_adapters.layers.parts.layerstep import AutogradStep, LayerStep, LayerSteps, LinearizedSteps, StepLength
from pdeopt.core.errors import InputError
from pdeopt.steps.mgrit import MgritSettings

#: Settings of MGRIT that gates need, which jump where layers do not: three levels, a cycle with FCF-relaxation.
SEQUENCES = {"coarsening": "4", "levels": 3, "cycles": 1, "adjoint_cycles": 1, "relaxation": "FCF"}


class GRUStack(nn.Module):
    """Stacked GRUs, one step after the other: the reference for `GRUParallel`. Parameters are named as in `nn.GRU`.

    Called with sequences (batch, steps, input_size), and a mask (batch, steps) if some are shorter, it returns the last
    hidden state of the last layer, (batch, hidden_size).

    Args:
        input_size, hidden_size: features of a step, and of a layer's state.
        num_layers: GRUs, one on top of the other.
        kind: "implicit" or "classic".

    Raises:
        InputError: another kind.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, kind: str = "implicit") -> None:
        super().__init__()
        if kind not in GRU_STEPS:
            raise InputError("kind of GRU", kind, " | ".join(GRU_STEPS))
        self.kind, self.input_size, self.hidden_size, self.num_layers = kind, input_size, hidden_size, num_layers
        bound = 1.0 / math.sqrt(hidden_size)
        for name, shape in parameter_shapes(input_size, hidden_size, num_layers).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last hidden state of the last layer, (batch, hidden), of sequences (batch, steps, input)."""
        return in_series(self, x, mask)


def in_series(network: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The last hidden state of a `GRUStack` or a `GRUParallel`, by PyTorch's operations alone, on this process."""
    rows, present = x.transpose(0, 1), None if mask is None else mask.T
    for layer in range(network.num_layers):
        gates, shared = gates_of_inputs(network, layer, rows)
        gates = hold_where_padded(gates, present)
        h, states = rows.new_zeros((1, rows.shape[1], network.hidden_size)), []
        for row in gates.split(1):  # one node of autograd: gradients of slices would be as large as all steps, each
            h = GRU_STEPS[network.kind](h, (row,), shared, 1.0)
            states.append(h)
        rows = torch.cat(states)
    return rows[-1]


def parameter_shapes(input_size: int, hidden_size: int, num_layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of `nn.GRU`, in the order in which they are drawn."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(num_layers):
        for name, size in (("ih", input_size if layer == 0 else hidden_size), ("hh", hidden_size)):
            shapes[f"weight_{name}_l{layer}"] = (3 * hidden_size, size)
            shapes[f"bias_{name}_l{layer}"] = (3 * hidden_size,)
    return shapes


def gates_of_inputs(network: nn.Module, layer: int, rows: Tensor, mpi: Any = None) -> tuple[Tensor, list[Tensor]]:
    """W x + b of all steps at once, (steps, batch, 3 hidden), and U and c.

    Args:
        network: with the parameters.
        layer: of the stack.
        rows: x, (steps, batch, inputs).
        mpi: ranks that see their steps only, over which gradients of W and b are added up.
    """
    names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
    W, b, U, c = (getattr(network, f"{name}_l{layer}") for name in names)
    if mpi is not None and mpi.size > 1:
        W, b = summed_gradient(W, mpi), summed_gradient(b, mpi)
    return torch.nn.functional.linear(rows, W, b), [U, c]


#: The logit of an update gate z that is 1 to the last bit, whatever the hidden state adds to it.
HELD = 1e4


def hold_where_padded(gates: Tensor, mask: Tensor | None) -> Tensor:
    """The gates of inputs with z = 1 in steps that are padding: there the state stays as it is, on coarse levels, too.

    So the last state of a padded sequence is that after its last true step, and padding has no part in gradients.

    Args:
        gates: W x + b, (steps, batch, 3 hidden).
        mask: false where a sequence is padded, (steps, batch); None for no padding.

    Raises:
        InputError: a mask of another shape or type.
    """
    if mask is None:
        return gates
    if mask.shape != gates.shape[:2] or mask.dtype != torch.bool:
        got = f"{mask.dtype}, {tuple(mask.shape)}"
        raise InputError("mask of sequences", got, f"torch.bool, one a step of each sequence, {tuple(gates.shape[:2])}")
    r, z, n = gates.chunk(3, -1)
    return torch.cat([r, torch.where(mask[..., None], z, HELD), n], -1)


class GRUParallel(ParallelModule):
    """Stacked GRUs whose sequence of `num_steps` is solved by MGRIT; parameters are named as those of `nn.GRU`.

    Called with whole sequences (batch, num_steps, input_size), equal on all ranks, it returns the last hidden state of
    the last layer, (batch, hidden_size), equal on all ranks. Shorter sequences are padded with anything that is finite;
    a mask (batch, num_steps), false where they are, makes the result that of their true steps. Collective over `comm`,
    and so is the backward pass. A rank works on its part of the steps; parameters and their gradients are equal on
    all ranks, so that any optimizer will do. Gates of the inputs are found once, outside of the cycles. In `eval()`
    mode and under `no_grad` one step goes after the other, and nothing is approximated.

    Source: G. E. Moon, E. C. Cyr, Parallel training of GRU networks with a multi-grid solver for long sequences,
    ICLR 2022; the solver is that of `LayerParallel`.

    Args:
        comm: an mpi4py or PETSc communicator; None for this process alone.
        input_size: features of a step of the sequence.
        hidden_size: of a layer's state.
        num_steps: length of the sequences.
        num_layers: GRUs, one on top of the other.
        kind: "implicit", the unit of Moon and Cyr, or "classic", the unit of PyTorch.
        settings: of MGRIT; keywords replace single ones. By default `SEQUENCES`.
        approximate: whether the cycles serve in `eval()` mode and under `no_grad`, too.

    Raises:
        InputError: another kind, settings and keywords at once, coarsening factors that are not legal, more ranks than
            intervals; when called, sequences of another shape, or inside a transform of `torch.func`.
        RuntimeError: as of `LayerParallel`.

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
        approximate: bool = False,
        **words: Any,
    ) -> None:
        super().__init__(approximate)
        if settings is not None and words:
            raise InputError("GRUParallel", f"settings and {', '.join(words)}", "one of the two")
        self.kind, self.input_size, self.hidden_size, self.num_layers = kind, input_size, hidden_size, num_layers
        self.num_steps = num_steps
        settings = settings or MgritSettings(**{**SEQUENCES, **words})
        comm = MPI.COMM_SELF if comm is None else comm
        drawn = GRUStack(input_size, hidden_size, num_layers, kind)
        self.solvers = [LayerMgrit(num_steps, float(num_steps), comm, settings) for _ in range(num_layers)]
        for name, parameter in drawn.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last hidden state of the last layer, (batch, hidden), of sequences (batch, steps, input). Collective."""
        legal = (self.num_steps, self.input_size)
        if x.dim() != 3 or x.shape[1:] != legal:
            raise InputError("sequences", tuple(x.shape), f"(batch, {self.num_steps}, input = {self.input_size})")
        own = slice(self.grid.begin, self.grid.end)
        if mask is not None and mask.shape != x.shape[:2]:
            raise InputError(
                "mask of sequences", tuple(mask.shape), f"one a step of each sequence, {tuple(x.shape[:2])}"
            )
        return self.from_rows(x[:, own].transpose(0, 1), None if mask is None else mask[:, own].T)

    def from_rows(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `forward`, from the inputs of this rank's steps, (n_local, batch, input), as an encoder makes them.

        A mask is (n_local, batch), too.
        """
        hidden = rows.new_zeros((rows.shape[1], self.hidden_size))
        end = hidden
        by_hand = not autocast_state(rows.device.type)["enabled"]
        own = GRU_STEPS[self.kind]
        step: LayerStep = (
            GRUStep(self.kind) if by_hand else AutogradStep(own, partial(long_step, own), takes_means=False)
        )
        exact = self.is_exact
        for layer, solver in enumerate(self.solvers):
            gates, shared = gates_of_inputs(self, layer, rows, self.grid.mpi)
            gates = hold_where_padded(gates, mask)
            more = layer < self.num_layers - 1
            solver.look(hidden, shared, is_shared=True)
            end, rows = solve_layers(solver, step, hidden, [gates], shared, more, exact)
        return end

    def forward_in_series(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `forward`, one step after the other on this process, with gradients by this module's parameters."""
        return in_series(self, x, mask)

    def serial(self) -> GRUStack:
        """The network one step after the other, with copies of all weights; `load_state_dict` is the way back."""
        with torch.random.fork_rng(devices=[]):  # the first weights do not count
            network = GRUStack(self.input_size, self.hidden_size, self.num_layers, self.kind)
        network.load_state_dict(self.state_dict())
        network.to(self.weight_hh_l0.device, self.weight_hh_l0.dtype)
        for own, parameter in zip(self.parameters(), network.parameters()):
            parameter.requires_grad_(own.requires_grad)
        return network.train(self.training)

    def extra_repr(self) -> str:
        sizes = f"input_size={self.input_size}, hidden_size={self.hidden_size}, num_layers={self.num_layers}"
        return f"{self.kind}, {sizes}, num_steps={self.num_steps}, factors={self.solvers[0].factors}"


def sum_gradient_over_ranks(parameter: nn.Parameter, mpi: Any) -> None:
    """Make the gradient of a parameter the sum over ranks, from now on.

    For modules that act on the steps of their rank alone, as encoders before `GRUParallel.from_rows` do.

    Args:
        parameter: equal on all ranks.
        mpi: the communicator, `network.grid.mpi`. The backward pass is then collective over it.
    """
    if mpi.size > 1:
        parameter.register_hook(lambda gradient: sum_over_ranks(mpi, gradient))


# -- steps, and their derivatives by hand -------------------------------------------------------------------


class GRUStep:
    """A step of a GRU as a `LayerStep`: controls are the gates of the inputs, shared are U and its bias.

    Args:
        kind: one of `GRU_STEPS`.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.function = kind, GRU_STEPS[kind]

    def __call__(self, u: Tensor, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: StepLength) -> Tensor:
        return self.function(u, controls, shared, dt)

    def linearize(
        self, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: Callable[[slice], StepLength]
    ) -> GRULinearized:
        return GRULinearized(self, controls, shared, dt)

    def over_intervals(self, shortest: float) -> LongGRUStep:
        """The step of coarse levels."""
        return LongGRUStep(self.kind, shortest)


@dataclass(frozen=True)
class LongGRUStep:
    """The step of two stages in the place of an interval of steps of length `shortest`, see `grugates.long_step`.

    The gates of its inputs are those in the middle of the interval: their means are no better, and worse for classic
    units.
    """

    kind: str
    shortest: float
    takes_means: bool = False

    def __call__(self, u: Tensor, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: StepLength) -> Tensor:
        return long_step(GRU_STEPS[self.kind], self.shortest, u, controls, shared, dt)

    def linearize(
        self, controls: Sequence[Tensor], shared: Sequence[Tensor], dt: Callable[[slice], StepLength]
    ) -> LongGRULinearized:
        return LongGRULinearized(self, controls, shared, dt)


class Moved(NamedTuple):
    """Of h_t = n + q (h - n): q; derivatives of h_t by the logit of z, and by the sum in n; of that by r's logit; r."""

    q: Tensor
    by_z: Tensor
    by_n: Tensor
    by_r: Tensor
    r: Tensor

    def of_gates(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The cotangents of U h + c, and of the sum in n, from that of h_t."""
        s = w * self.by_n
        return torch.cat([s * self.by_r, w * self.by_z, s * self.r], -1), s

    def rows(self, rows: slice) -> Moved:
        """Of some of the steps."""
        return Moved(*(part[rows] for part in self))


def move(kind: str, h: Tensor, at: Tensor, x: Tensor, shared: Sequence[Tensor], dt: StepLength) -> tuple[Moved, Tensor]:
    """h_t with the gates of the states `at`, and its derivatives by these gates."""
    size, a = h.shape[-1], torch.nn.functional.linear(at, *shared)
    r, z = torch.sigmoid(x[..., : 2 * size] + a[..., : 2 * size]).split(size, -1)
    a_n = a[..., 2 * size :]
    n = torch.addcmul(x[..., 2 * size :], r, a_n).tanh_()
    q, slope = kept(kind, z, dt)
    ahead, less = h - n, q - 1.0
    by_n = n.square().sub_(1.0).mul_(less)
    by_r = (r * a_n).mul_(1.0 - r)
    value = torch.addcmul(h, less, ahead)  # h to the last bit where q is 1
    return Moved(q, slope.mul_(ahead), by_n, by_r, r), value


def through_gates(w: Tensor, of_hidden: Tensor, U: Tensor) -> Tensor:
    """w + U' of_hidden: the cotangent of the states that gates see is added to one of states, (rows, batch, hidden)."""
    return torch.addmm(w.flatten(0, 1), of_hidden.flatten(0, 1), U).view_as(w)


class GRULinearized(LayerSteps):
    """Steps of a GRU at their states; a piece is h, and its `Moved`."""

    step: GRUStep

    def remember(self, u: Tensor, rows: slice) -> Tensor:
        moved, value = move(self.step.kind, u, u, self.controls[0][rows], self.shared, self.dt(rows))
        self.pieces[rows.start, rows.stop, rows.step] = u, moved
        return value

    def pullback(self, w: Tensor, rows: slice) -> Tensor:
        _, moved = self.pieces[rows.start, rows.stop, rows.step]
        return through_gates(w * moved.q, moved.of_gates(w)[0], self.shared[0])

    def gradients(self, w: Tensor, rows: slice) -> tuple[Tensor, ...]:
        u, moved = self.pieces.pop((rows.start, rows.stop, rows.step))
        of_hidden, s = moved.of_gates(w)
        of_inputs = torch.cat([of_hidden[..., : 2 * u.shape[-1]], s], -1)
        flat = of_hidden.flatten(0, 1)
        before = through_gates(w * moved.q, of_hidden, self.shared[0])
        return before, of_inputs, flat.T @ u.flatten(0, 1), flat.sum(0)


class LongGRULinearized(LinearizedSteps):
    """Long steps at their states; a piece is the `Moved` of both stages."""

    step: LongGRUStep

    def remember(self, u: Tensor, rows: slice) -> Tensor:
        kind, x, dt = self.step.kind, self.controls[0][rows], self.dt(rows)
        first, middle = move(kind, u, u, x, self.shared, half_way(dt, self.step.shortest))
        second, value = move(kind, u, middle, x, self.shared, dt)
        self.pieces[rows.start, rows.stop, rows.step] = first, second
        return value

    def pullback(self, w: Tensor, rows: slice) -> Tensor:
        if (None, None, None) not in self.pieces:
            assert self.states is not None
            self.remember(self.states, slice(None))  # all steps of the level at once
        first, second = (moved.rows(rows) for moved in self.pieces[None, None, None])
        U = self.shared[0]
        of_middle = second.of_gates(w)[0].flatten(0, 1).mm(U).view_as(w)
        return through_gates(torch.addcmul(w * second.q, of_middle, first.q), first.of_gates(of_middle)[0], U)
