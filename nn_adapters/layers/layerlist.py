"""Networks whose blocks are not all alike, solved in parallel over all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from nn_adapters.layers.blocks import by_position, make_layers
from nn_adapters.layers.given import (
    NUMBER,
    FirstLooks,
    GivenCall,
    PreparedBlock,
    draw_seed,
    in_series,
    layer_numbers,
    layer_step,
    numbers_of,
)
from nn_adapters.layers.layer_mgrit import LayerMgrit
from nn_adapters.layers.layersolve import solve_layers
from nn_adapters.layers.parts.batchnorm import Statistics
from nn_adapters.layers.parts.context import outside_compilation
from nn_adapters.layers.parts.layerstep import AutogradStep, LayerStep, StepLength
from nn_adapters.layers.parts.likeness import Likeness
from nn_adapters.layers.parts.stacking import Shelf, Template, stack_modules
from nn_adapters.layers.stackedlayers import StackedLayers
from pdeopt.core.errors import InputError
from pdeopt.steps.mgrit import MgritSettings


class LayerList(StackedLayers):
    """The residual network u_i = u_{i-1} + dt F_i(u_{i-1}; z_i) with blocks F_i of several kinds, solved by MGRIT.

    As `LayerParallel`, with a block of its own for each layer, in any order, as long as all keep the shape of features.
    Layers of one kind, whose modules are alike but for the numbers in parameters and buffers, are evaluated together
    wherever they stand in their intervals. Coarse steps are by injection: the block in the middle of an
    interval, over the interval's time, so that the cycles converge fast where blocks come in runs that are longer than
    intervals. Where unlike blocks alternate, a pair of them as one block of a `LayerParallel` has the better coarse
    problem. Solved to convergence, or after as many cycles as there are intervals, values and gradients are those of
    the serial network, on any number of ranks, whatever the order.

    Args:
        comm: an mpi4py or PETSc communicator; None for this process alone.
        blocks: makes the module of each layer, one function a layer, as `[lambda: conv(4)] * 8 + [Mixer] * 8`; called
            once, in order, on all ranks. `Direct(F)` makes u_i = F(u_{i-1}).
        Tf: time of all layers, dt = Tf / N.
        settings: of MGRIT; keywords replace single ones.
        approximate: whether the cycles serve in `eval()` mode and under `no_grad`, too.

    Attributes:
        kinds: which of the shelves has a layer, for all N layers.
        stack: parameters of the layers of this rank, kind by kind: `stack[0]`.
        solvers: a list of the one solver.

    Raises:
        InputError: as `LayerParallel` does; no blocks; kinds with parameters of unlike dtypes.

    Example:
        >>> layers = LayerList(MPI.COMM_WORLD, [lambda: dense(8)] * 32 + [lambda: dense(8, "relu")] * 32, Tf=2.0)
        >>> layers.load_state_dict(LayerStack(...).state_dict())         # the same keys
    """

    def __init__(
        self,
        comm: Any,
        blocks: Sequence[Callable[[], nn.Module]],
        Tf: float = 1.0,
        settings: MgritSettings | None = None,
        approximate: bool = False,
        **words: Any,
    ) -> None:
        super().__init__(approximate)
        if settings is not None and words:
            raise InputError("LayerList", f"settings and {', '.join(words)}", "one of the two")
        if callable(blocks) or len(blocks) == 0:
            got = "no blocks" if not callable(blocks) else type(blocks).__name__
            raise InputError("blocks of LayerList", got, "a list of functions, each of which makes a module")
        self.num_steps, self.Tf = len(blocks), Tf
        settings = settings or MgritSettings(**words)
        self.solvers = [LayerMgrit(self.num_steps, Tf, MPI.COMM_SELF if comm is None else comm, settings)]
        self._shelve(blocks)
        self.stack = nn.ModuleList(shelf.stack for shelf in self.shelves)
        self._looks = [FirstLooks(shelf) for shelf in self.shelves]
        self._prepare()

    def _shelve(self, blocks: Sequence[Callable[[], nn.Module]]) -> None:
        """Sort the layers by kind; modules of other ranks are made, and given up."""
        begin, end = self.grid.begin, self.grid.end
        examples: dict[Hashable, nn.Module] = {}
        own: dict[Hashable, dict[int, nn.Module]] = {}
        signs, likeness = [], Likeness(alike=False)
        for i, block in enumerate(blocks):
            (layer,) = make_layers(block, 1)
            signs.append(tuple(likeness.look(layer).items()))
            examples.setdefault(signs[-1], layer)
            if begin <= i < end:
                own.setdefault(signs[-1], {})[i] = layer
        order = list(examples)
        self.kinds = [order.index(sign) for sign in signs]
        self.shelves = []
        for kind, (sign, example) in enumerate(examples.items()):
            layers = own.get(sign, {})
            stack = stack_modules(list(layers.values()), example)
            before, total = self.kinds[:begin].count(kind), self.kinds.count(kind)
            self.shelves.append(Shelf(Template(example), stack, list(layers), before, total))

    def _prepare(self) -> None:
        self._prepared = [PreparedBlock(shelf.template.module) for shelf in self.shelves]
        self._indices = Indices()
        for prepared in self._prepared:  # refuses what cannot be batched
            layer_step(prepared.block, False, True)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_prepared", "_indices")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare()

    def _kind(self, layer: int) -> int:
        return self.kinds[layer]

    @property
    def template(self) -> nn.ModuleList:
        """One block of each kind, whose parameters count for nothing."""
        return nn.ModuleList(shelf.template.module for shelf in self.shelves)

    def forward(self, u: Tensor, *args: Any, **words: Any) -> Tensor:
        """The features after all layers, (batch, ...), on all ranks. Collective.

        Further arguments, by position or by names that all blocks have in the same place, go to the block of every
        layer, and are equal on all ranks; tensors among them get gradients.
        """
        return self._solve(u, self._by_position(args, words), trajectory=False)[0]

    def trajectory(self, u: Tensor, *args: Any, **words: Any) -> Tensor:
        """The features after each layer of this rank, (n_local, batch, ...). Collective."""
        return self._solve(u, self._by_position(args, words), trajectory=True)[1]

    def _by_position(self, args: tuple[Any, ...], words: dict[str, Any]) -> tuple[Any, ...]:
        first, *others = [by_position(block, args, words) for block in self.template]
        for each in others if words else ():
            pairs = list(zip_longest(first, each))
            if not all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in pairs):
                got = f"{', '.join(words)}, in places that differ from block to block"
                raise InputError("arguments of blocks", got, "names that all blocks have in the same place")
        return first

    @outside_compilation
    def _solve(self, u: Tensor, args: Sequence[Any], trajectory: bool) -> tuple[Tensor, Tensor]:
        (solver,), begin = self.solvers, self.grid.begin
        packing = Packing(self.shelves, begin)
        for shelf in self.shelves:
            shelf.template.follow(shelf.stack)
        modes = [each.follow() for each in self._prepared]
        for look in self._looks:
            u = u.to(look.dtype(u, args))
        most = max(self.shelves, key=lambda shelf: shelf.total)
        solver.look(u, most.template.find(most.stack))
        exact = self.is_exact or not solver.factors or solver.is_serial or solver.is_dear()
        drops = any(each.drops for each in self._prepared)
        if exact and not (drops or trajectory or self.grid.mpi.size > 1):
            solver.residuals, solver.gaps = ([], []), (0.0, 0.0)
            places = [self._place(i) for i in range(self.num_steps)]
            return in_series(places, u, args, self.Tf / self.num_steps), u.new_empty(0)
        seed = draw_seed(self.grid.mpi, u.device) if drops else None
        rows = self._indices.on([self._place(i)[1] for i in range(begin, self.grid.end)], u.device)
        steps, statistics = [], []
        for shelf, prepared, own in zip(self.shelves, self._prepared, modes):
            buffers = shelf.template.find_buffers(shelf.stack)
            found = Statistics(prepared.norms, buffers) if buffers else None
            call = GivenCall(args, own, seed if prepared.drops else None, found, begin, rows)
            steps.append(layer_step(prepared.block, False, True, call))
            statistics += [found] if found is not None else []
        step = AutogradStep(partial(self._mixed, steps, packing), axis=steps[0].axis)  # over intervals: injection
        controls = [packing.pack(self._indices), numbers_of(range(begin, self.grid.end), torch.device("cpu"))]
        words = {"trajectory": trajectory, "exact": exact, "learns": self.training}
        ends = solve_layers(solver, step, u, controls, call.shared, **words)
        for each in statistics:
            each.move_averages()
        return ends

    def _mixed(
        self,
        steps: Sequence[LayerStep],
        packing: Packing,
        u: Tensor,
        controls: Sequence[Tensor],
        shared: Sequence[Tensor],
        dt: StepLength,
    ) -> Tensor:
        """Steps of layers of several kinds: those of one kind together.

        Kinds and numbers of layers are in the memory of the host, so that no device is waited for.
        """
        packed, numbers = controls
        layers, by_kind = layer_numbers(numbers).tolist(), dict[int, list[int]]()
        for row, layer in enumerate(layers):
            by_kind.setdefault(self.kinds[layer], []).append(row)
        parts, index = [], partial(self._indices.on, device=u.device)
        for kind, own in by_kind.items():
            rows, these = index(own), index([layers[row] for row in own]) * NUMBER
            theta = [*packing.unpack(kind, packed.index_select(0, rows)), these]
            parts.append(steps[kind](u.index_select(0, rows), theta, shared, dt if isinstance(dt, float) else dt[rows]))
        back = _inverse([row for own in by_kind.values() for row in own])
        return parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, index(back))

    def extra_repr(self) -> str:
        kinds = "".join(f", {s.total} x {' '.join(repr(s.template.module).split())}" for s in self.shelves)
        return f"num_steps={self.num_steps}, Tf={self.Tf}, factors={self.solvers[0].factors}{kinds}"


def _inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes another one."""
    return sorted(range(len(order)), key=order.__getitem__)


class Indices:
    """Index tensors on devices, each brought there once: inside of a CUDA graph nothing comes from the host."""

    def __init__(self) -> None:
        self._known: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def on(self, values: Sequence[int], device: torch.device) -> Tensor:
        """These numbers on a device, not to be changed."""
        key = device, tuple(values)
        if key not in self._known:
            self._known[key] = torch.tensor(values, dtype=torch.long, device=device)
        return self._known[key]


class Packing:
    """The parameters of unlike layers as rows of one tensor: those of a layer, flat, and zeros up to the largest.

    So they are controls of steps as any others, which ranks, intervals and coarse levels take row by row.

    Args:
        shelves: of the kinds.
        begin: number of the first layer of this rank.

    Raises:
        InputError: parameters of unlike dtypes.
    """

    def __init__(self, shelves: Sequence[Shelf], begin: int) -> None:
        self.stacks = [shelf.template.find(shelf.stack) for shelf in shelves]
        self.shapes = [[p.shape[1:] for p in stacks] for stacks in self.stacks]
        self.sizes = [[shape.numel() for shape in shapes] for shapes in self.shapes]
        self.order = [layer - begin for shelf in shelves for layer in shelf.layers]
        self.counts = [len(shelf.layers) for shelf in shelves]
        self.device = next((p.device for stacks in self.stacks for p in stacks), torch.device("cpu"))
        self.dtypes = {p.dtype for stacks in self.stacks for p in stacks} or {torch.get_default_dtype()}
        if len(self.dtypes) > 1:
            raise InputError("blocks of LayerList", f"parameters of {sorted(map(str, self.dtypes))}", "one dtype")

    def pack(self, indices: Indices) -> Tensor:
        """The parameters of the layers, (n_local, numbers of the largest), with gradients."""
        width, (dtype,), parts = max(map(sum, self.sizes)), self.dtypes, []
        for stacks, sizes, count in zip(self.stacks, self.sizes, self.counts):
            flat = [stack.flatten(1) for stack in stacks]
            like = flat[0] if flat else torch.empty(0, dtype=dtype, device=self.device)
            parts.append(torch.cat([*flat, like.new_zeros(count, width - sum(sizes))], 1))
        return torch.cat(parts).index_select(0, indices.on(_inverse(self.order), parts[0].device))

    def unpack(self, kind: int, rows: Tensor) -> list[Tensor]:
        """The parameters of layers of one kind, (layers, ...) each, from their rows."""
        parts = rows[:, : sum(self.sizes[kind])].split(self.sizes[kind], 1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes[kind])]
