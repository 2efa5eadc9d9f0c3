"""Deep networks whose layers are solved in parallel, as ordinary PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpi4py import MPI
from torch import Tensor, nn

from nn_adapters.layers.blocks import by_position, make_layers
from nn_adapters.layers.densestep import DenseStep
from nn_adapters.layers.given import FirstLooks, GivenCall, PreparedBlock, draw_seed, in_series, layer_step, numbers_of
from nn_adapters.layers.layer_mgrit import LayerMgrit
from nn_adapters.layers.layersolve import solve_layers
from nn_adapters.layers.parts.batchnorm import Statistics
from nn_adapters.layers.parts.context import autocast_state, outside_compilation, refuse_transforms
from nn_adapters.layers.parts.fusedchain import (
    FusedChain,
    fused_kind,
    is_cheaper,
    is_cheaper_in_turn,
    is_cheaper_inside,
)
from nn_adapters.layers.parts.likeness import Likeness
from nn_adapters.layers.parts.splines import DepthSpline, parametrize_stack
from nn_adapters.layers.parts.stacking import Shelf, Template, stack_modules
from nn_adapters.layers.stackedlayers import StackedLayers
from pdeopt.core.errors import InputError
from pdeopt.steps.mgrit import MgritSettings


class LayerParallel(StackedLayers):
    """The residual network u_i = u_{i-1} + dt F(u_{i-1}; z_i), i = 1..N, dt = Tf / N, solved by MGRIT over its layers.

    An ordinary module: loss, optimizer and loop are PyTorch's own. Values and gradients are those of a few multigrid
    cycles, by default one forward and none backward, where the coarse problem's solution is enough to begin at.
    `measure_bias` tells their error, `exactly` and `serial` give what they approximate. In a training, `CycleControl`
    keeps the error within a limit, as `Training` does; without it, rough weights may want `adjoint_cycles=1`.

    On one rank, where cycles save calls and no arithmetic, layers that have so much to do that cycles have no less go
    one after the other, exact (`serial="never"`: cycles all the same), and narrow dense ones through a compiled loop.

    In `eval()` mode and under `no_grad` it is the serial network, to rounding: one layer after the other. With
    `approximate=True`, or inside `approximately(network)`, the cycles serve there, too.

    Calling it is collective over `comm`, and so is the backward pass. Every rank gives the same features u_0 and gets
    the same u_N, of the same shape, on the device of the parameters; dtypes, and `torch.autocast`, are as for the
    serial network. A rank owns the parameters of its layers and their gradients; those of what stands before and after
    the layers are equal on all ranks. Optimizers that work entry by entry (SGD, Adam, ...) then need no
    communication; what takes norms over all parameters must sum them over ranks, as `clip_grad_norm_` does.

    The method is layer-parallel training of S. Guenther, L. Ruthotto, J. B. Schroder, E. C. Cyr, N. R. Gauger
    (SIAM J. Math. Data Sci. 2, 2020) with multigrid reduction in time of R. D. Falgout, S. Friedhoff, T. V. Kolev,
    S. P. MacLachlan, J. B. Schroder (SIAM J. Sci. Comput. 36, 2014).

    Args:
        comm: an mpi4py or PETSc communicator; None for this process alone.
        block: makes the module F of a layer, as `lambda: dense(8)`; called once a layer, in order, on all ranks, so
            that random weights are those of the serial network. F maps features (batch, ...) to features of the same
            shape; `Direct(F)` makes u_i = F(u_{i-1}). F may use a parameter twice, but each layer has its own; in all
            else than these numbers layers are alike. Batch norms see the batch; their running averages move once a
            call in training, by the last states.
        num_steps: layers N.
        Tf: time.
        settings: of MGRIT; keywords replace single ones: `LayerParallel(comm, block, 1024, 1.0, coarsening="16")`.
        approximate: whether the cycles serve in `eval()` mode and under `no_grad`, too.

    Attributes:
        grid: the layers of this rank are `grid.begin` to `grid.end`, `grid.mpi` is the communicator.
        stack: parameters of the layers of this rank, named as those of a block: `stack.0.weight` is (n_local, ...).
        stacks: a list of them.
        solvers: a list of the one solver.
        template: one block, whose parameters count for nothing.

    State:
        `state_dict` has the keys of `LayerStack`, `layers.{i}.{name}`, on a rank those of its layers. It loads
        dictionaries of all layers as well as those of this rank's; `full_state_dict` gathers all layers. Copies, and
        pickles that are read on as many ranks, are on the same communicator.

    Raises:
        InputError: settings and keywords at once; coarsening factors that are not legal; more ranks than intervals;
            a block that is no function which makes new modules of one kind and size, or with random numbers other
            than those of `nn.Dropout`, or with a `step` of its own; when called, inside a transform of `torch.func`,
            or a block that changes the shape of features, or buffers other than those of `nn.BatchNorm1d`, 2d and 3d,
            or that uses tensors from outside which need gradients.
        RuntimeError: features of another width, dtype or device, from PyTorch itself; a backward pass through cycles
            with `create_graph`, or a second one without `retain_graph`.

    Example:
        >>> layers = LayerParallel(MPI.COMM_WORLD, lambda: dense(8), num_steps=1024, Tf=1.0, coarsening="16")
        >>> network = nn.Sequential(nn.Linear(2, 8), layers, nn.Linear(8, 5))
        >>> nn.functional.cross_entropy(network(x), labels).backward()
    """

    def __init__(
        self,
        comm: Any,
        block: Callable[[], nn.Module],
        num_steps: int,
        Tf: float = 1.0,
        settings: MgritSettings | None = None,
        approximate: bool = False,
        **words: Any,
    ) -> None:
        super().__init__(approximate)
        if settings is not None and words:
            raise InputError("LayerParallel", f"settings and {', '.join(words)}", "one of the two")
        self.num_steps, self.Tf = num_steps, Tf
        self.settings = settings or MgritSettings(**words)
        self.solvers = [LayerMgrit(num_steps, Tf, MPI.COMM_SELF if comm is None else comm, self.settings)]
        own = self._own_layers(block)
        self.stack = stack_modules(own)
        where = range(self.grid.begin, self.grid.end)
        self.shelves = [Shelf(Template(own[0]), self.stack, where, where.start, num_steps)]
        self._looks = FirstLooks(self.shelves[0])
        self._prepare()
        self._fused_kind = fused_kind(own[0])

    @property
    def template(self) -> nn.Module:
        """One block, whose parameters and buffers count for nothing."""
        return self.shelves[0].template.module

    @property
    def names(self) -> list[str]:
        """Of the parameters of a block, in the order of `stacks`."""
        return self.shelves[0].template.names

    def _own_layers(self, block: Callable[[], nn.Module]) -> list[nn.Module]:
        """The modules of this rank's layers; all are made, so that random numbers are those of the serial network."""
        own, likeness = [], Likeness()
        for i, layer in enumerate(make_layers(block, self.num_steps)):
            likeness.look(layer)
            if self.grid.begin <= i < self.grid.end:
                own.append(layer)
        return own

    def _prepare(self) -> None:
        """The functions of many layers at once."""
        self._prepared = PreparedBlock(self.template)
        serving = self._prepared.serving
        self.step = layer_step(serving, prepared=True)
        self.step_by_autograd = layer_step(serving, by_hand=False, prepared=True)
        self.solvers[0].stages = 1 + int(self.step_by_autograd.over_intervals(1.0) is not self.step_by_autograd)

    def __getstate__(self) -> dict[str, Any]:
        left = ("step", "step_by_autograd", "_prepared")
        return {key: value for key, value in self.__dict__.items() if key not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare()

    def use_splines(self, degree: int, points: int) -> LayerParallel:
        """Make the weights B-splines in depth, whose coefficients are the parameters from now on. Collective.

        Each parameter of `stack` becomes that of `points` layers, (points, ...), equal on all ranks, with gradients
        summed over ranks; they begin as the least-squares fit of the weights that are there. `state_dict` has them
        instead of the layers' weights, for a network of any depth; `full_state_dict` and `serial` have the layers'.
        `torch.nn.utils.parametrize.remove_parametrizations` is the way back. PyTorch pickles no such modules.

        Args:
            degree: of the pieces: 0, constant; 1; 2; 3, cubic.
            points: coefficients of a weight, from degree + 1 to `num_steps`.

        Returns:
            this network.

        Raises:
            InputError: a degree or a number of coefficients that is not legal; weights with a parametrization.

        Example:
            >>> layers = LayerParallel(None, lambda: dense(8), 1024, 5.0).use_splines(degree=1, points=16)
        """
        parametrize_stack(self.stack, self.names, DepthSpline(degree, points, self.solvers[0]))
        return self

    def forward(self, u: Tensor, *args: Any, **words: Any) -> Tensor:
        """The features after all layers, (batch, ...), on all ranks. Collective.

        Further arguments, by position or by the names of the block's `forward`, go to the block of every layer, and
        are equal on all ranks; tensors among them get gradients.
        """
        return self._solve(u, by_position(self.template, args, words), trajectory=False)[0]

    def trajectory(self, u: Tensor, *args: Any, **words: Any) -> Tensor:
        """The features after each layer of this rank, (n_local, batch, ...). Collective."""
        return self._solve(u, by_position(self.template, args, words), trajectory=True)[1]

    @outside_compilation
    def _solve(self, u: Tensor, args: Sequence[Any], trajectory: bool) -> tuple[Tensor, Tensor]:
        (solver,), (shelf,), stacks = self.solvers, self.shelves, self.stacks
        shelf.template.follow(shelf.stack)
        u = u.to(self._looks.dtype(u, args))
        solver.look(u, stacks)
        exact = self.is_exact or not solver.factors or solver.is_serial or solver.is_dear()
        fits = not (trajectory or args) and self._fits_loops(u)
        is_alone, takes_chain = self.grid.mpi.size == 1, fits and self.settings.fused == "auto"
        if takes_chain and not (exact or is_alone):
            exact = is_cheaper_in_turn(u, stacks, solver)
        step = self.step_by_autograd if autocast_state(u.device.type)["enabled"] else self.step
        modes = self._prepared.follow() if self._prepared.is_special else {}
        drops = self._prepared.drops
        cycles = None if exact else (solver.forward.cycles, solver.adjoint.cycles)
        if takes_chain and is_alone and is_cheaper(u, stacks, cycles):
            refuse_transforms()
            solver.residuals, solver.gaps = ([], []), (0.0, 0.0)
            end = FusedChain.apply(self._fused_kind, self.Tf / self.num_steps, _samples_last(u), *stacks)
            return end.mT.reshape(u.shape), u.new_empty(0)
        if exact and is_alone and not (drops or trajectory or isinstance(step, DenseStep)):
            solver.residuals, solver.gaps = ([], []), (0.0, 0.0)
            places = [(shelf, row) for row in range(self.num_steps)]
            return in_series(places, u, args, self.Tf / self.num_steps), u.new_empty(0)
        words = {"trajectory": trajectory, "exact": exact, "learns": self.training}
        if args or shelf.template.buffers or drops:
            seed = draw_seed(self.grid.mpi, u.device) if drops else None
            return self._solve_given(u, args, modes, seed, words)
        if not isinstance(step, DenseStep):
            return solve_layers(solver, step, u, stacks, **words)
        in_turn = exact and is_cheaper(u, stacks, None, self.num_steps)
        if fits and (in_turn or (not exact and solver.fit is None and is_cheaper_inside(u, stacks))):
            step = DenseStep(self.template, self._fused_kind)  # type: ignore[arg-type]
        end, states = solve_layers(solver, step, _samples_last(u), stacks, **words)
        return end.mT.reshape(u.shape), states.mT.reshape(-1, *u.shape) if trajectory else states

    def _solve_given(
        self,
        u: Tensor,
        args: Sequence[Any],
        modes: dict[nn.Module, bool],
        seed: int | Tensor | None,
        words: dict[str, bool],
    ) -> tuple[Tensor, Tensor]:
        """As `_solve`, with what this call gives to all layers: arguments, modes, buffers, and a seed for dropout."""
        (solver,), (shelf,), begin = self.solvers, self.shelves, self.grid.begin
        buffers = shelf.template.find_buffers(shelf.stack)
        statistics = Statistics(self._prepared.norms, buffers) if buffers else None
        call = GivenCall(args, modes, seed, statistics, begin)
        step = layer_step(self._prepared.serving, False, True, call)
        numbers = [numbers_of(range(begin, self.grid.end), u.device)] if call.numbered else []
        found = solve_layers(solver, step, u, [*self.stacks, *numbers], call.shared, **words)
        if statistics is not None:
            statistics.move_averages()
        return found

    def _fits_loops(self, u: Tensor) -> bool:
        """Whether compiled loops know the layers."""
        is_wanted = self._fused_kind is not None and self.settings.fused != "never"
        return is_wanted and not autocast_state(u.device.type)["enabled"]

    def extra_repr(self) -> str:
        block = " ".join(repr(self.template).split())
        return f"num_steps={self.num_steps}, Tf={self.Tf}, factors={self.solvers[0].factors}, block={block}"


def _samples_last(u: Tensor) -> Tensor:
    """Features (..., width) as (width, samples): see `densestep`."""
    return u.reshape(-1, u.shape[-1]).mT.contiguous()
