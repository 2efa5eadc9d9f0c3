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
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from nn_adapters.layers.coarsening import half_way
from nn_adapters.layers.layer_mgrit import LayerMgrit
from nn_adapters.layers.layersolve import refuse_in_graph, solve_layers
from nn_adapters.layers.parallelmodule import ParallelModule
from nn_adapters.layers.parts.context import autocast_state, outside_compilation, refuse_transforms, summed_gradient
from nn_adapters.layers.parts.grugates import GRU_STEPS, hold_where_padded, long_step, move, require_mask, through_gates
from nn_adapters.layers.parts.layerstep import AutogradStep, LayerStep, LayerSteps, LinearizedSteps, StepLength
from nn_adapters.layers.parts.samples import Shares
from pdeopt.core.errors import InputError
from pdeopt.steps.exchange.parcels import sum_over_ranks
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


class GRUParallel(ParallelModule):
    """Stacked GRUs whose sequence of `num_steps` is solved by MGRIT; parameters are named as those of `nn.GRU`.

    Called with whole sequences (batch, num_steps, input_size), equal on all ranks, it returns the last hidden state of
    the last layer, (batch, hidden_size), equal on all ranks. Shorter sequences are padded with anything that is finite;
    a mask (batch, num_steps), false where they are, makes the result that of their true steps. Collective over `comm`,
    and so is the backward pass. Parameters and their gradients are equal on all ranks, so that any optimizer will do.

    In cycles a rank works on its part of the steps; gates of the inputs are found once, outside of them. In `eval()`
    mode and under `no_grad`, and wherever cycles have no less to do, nothing is approximated: each rank takes its
    share of the samples through all steps, one after the other.

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
        InputError: another kind, settings and keywords at once, fitted long steps, coarsening factors that are not
            legal, more ranks than intervals; when called, sequences of another shape, or inside a transform of
            `torch.func`.
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
        if settings.long_steps == "fitted":  # each sequence has inputs of its own inside of an interval
            raise InputError("-layer_mgrit_long_steps", "fitted for GRUs", "stages, which have gates of the inputs")
        comm = MPI.COMM_SELF if comm is None else comm
        drawn = GRUStack(input_size, hidden_size, num_layers, kind)
        self.solvers = [LayerMgrit(num_steps, float(num_steps), comm, settings) for _ in range(num_layers)]
        self.alone = LayerMgrit(num_steps, float(num_steps), MPI.COMM_SELF, MgritSettings(1))
        for name, parameter in drawn.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last hidden state of the last layer, (batch, hidden), of sequences (batch, steps, input). Collective."""
        legal = (self.num_steps, self.input_size)
        if x.dim() != 3 or x.shape[1:] != legal:
            raise InputError("sequences", tuple(x.shape), f"(batch, {self.num_steps}, input = {self.input_size})")
        own = slice(self.grid.begin, self.grid.end)
        if mask is not None:
            require_mask(mask, x.shape[:2])
        return self.from_rows(x[:, own].transpose(0, 1), None if mask is None else mask[:, own].T)

    def from_rows(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `forward`, from the inputs of this rank's steps, (n_local, batch, input), as an encoder makes them.

        A mask is (n_local, batch), too.
        """
        if mask is not None:
            require_mask(mask, rows.shape[:2])
        step, hidden = self._step(rows), rows.new_zeros((rows.shape[1], self.hidden_size))
        shares = Shares(self.grid.mpi, self.grid.offsets, rows.shape[1])
        for layer, solver in enumerate(self.solvers):
            solver.look(hidden, [getattr(self, f"weight_hh_l{layer}")], shares.largest)
            solver.stages = 2  # of a long step, to count by
        if self._is_exact():
            return self._by_samples(step, rows, mask, shares)
        end = hidden
        for layer, solver in enumerate(self.solvers):
            gates, shared = gates_of_inputs(self, layer, rows, self.grid.mpi)
            gates, more = hold_where_padded(gates, mask), layer < self.num_layers - 1
            end, rows = solve_layers(solver, step, hidden, [gates], shared, more)
        return end

    def _step(self, rows: Tensor) -> LayerStep:
        """That of the units, with derivatives by hand where operations are not cast."""
        own = GRU_STEPS[self.kind]
        if autocast_state(rows.device.type)["enabled"]:
            return AutogradStep(own, partial(long_step, own), takes_means=False)
        return GRUStep(self.kind)

    def _is_exact(self) -> bool:
        """Whether a call goes through one step after the other: asked to, or because cycles have no less to do."""
        return self.is_exact or any(not each.factors or each.is_serial or each.is_dear() for each in self.solvers)

    @outside_compilation
    def _by_samples(self, step: LayerStep, rows: Tensor, mask: Tensor | None, shares: Shares) -> Tensor:
        """As `from_rows`, one step after the other; each rank takes its samples through all steps. Collective."""
        refuse_transforms()
        refuse_in_graph(self.solvers[0], self.solvers[0].exact)
        mpi, alone = self.grid.mpi, self.alone
        own, present = shares.own(rows), None if mask is None else shares.own(mask)
        end = hidden = own.new_zeros((own.shape[1], self.hidden_size))
        for layer, solver in enumerate(self.solvers):
            gates, shared = gates_of_inputs(self, layer, own, mpi)
            gates, more = hold_where_padded(gates, present), layer < self.num_layers - 1
            summed = [summed_gradient(each, mpi) for each in shared]
            end, own = solve_layers(alone, step, hidden, [gates], summed, more, exact=True)
            solver.gaps, solver.residuals = (0.0, 0.0), ([], [])
        return shares.all(end)

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

    axis = -1  # of the features in a state

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


#: States (steps x samples) whose gradients of U are one product; those of fewer take as long, to read and write them.
TOGETHER = 512


class GRULinearized(LayerSteps):
    """Steps of a GRU at their states; a piece is h, and its `Moved`.

    Attributes:
        waiting: cotangents of U h + c, and h, (states, ...) each, whose products are not yet in `of_shared`.
        of_shared: the cotangents of U and c so far; none before the first.
    """

    step: GRUStep

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.of_shared: list[Tensor] = []

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
        self.waiting.append((of_hidden.flatten(0, 1), u.flatten(0, 1)))
        if sum(len(states) for _, states in self.waiting) >= TOGETHER:
            self._multiply()
        return through_gates(w * moved.q, of_hidden, self.shared[0]), of_inputs

    def kept_back(self) -> list[Tensor]:
        if self.waiting:
            self._multiply()
        return self.of_shared

    def _multiply(self) -> None:
        of_hidden, u = (torch.cat(parts) for parts in zip(*self.waiting))
        self.waiting.clear()
        if self.of_shared:
            self.of_shared[0].addmm_(of_hidden.T, u)
            self.of_shared[1].add_(of_hidden.sum(0))
        else:
            self.of_shared = [of_hidden.T @ u, of_hidden.sum(0)]


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
