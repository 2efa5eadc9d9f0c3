"""Deep networks whose layers are solved in parallel, as ordinary PyTorch modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from nn_adapters.layers.batching import Given, batched, with_parameters
from nn_adapters.layers.blocks import Direct, SteppingBlock, make_layers
from nn_adapters.layers.coarsening import add_scaled, two_stages
from nn_adapters.layers.densestep import DenseStep, is_dense
from nn_adapters.layers.layer_mgrit import LayerMgrit, solve_layers
from nn_adapters.layers.layerstep import AutogradStep, LayerStep, StepLength
from nn_adapters.layers.parts.context import autocast_state, refuse_transforms
from nn_adapters.layers.parts.dropout import layer_keys, seed_dropout
from nn_adapters.layers.parts.fusedchain import FusedChain, fused_kind, is_cheaper
from nn_adapters.layers.stackedlayers import StackedLayers
from nn_adapters.layers.stacking import Template, check_fresh, stack_parameters
from pdeopt.core.errors import InputError
from pdeopt.steps.mgrit import MgritSettings


class LayerParallel(StackedLayers):
    """The residual network u_i = u_{i-1} + dt F(u_{i-1}; z_i), i = 1..N, dt = Tf / N, solved by MGRIT over its layers.

    An ordinary module: loss, optimizer and loop are PyTorch's own. Values and gradients are those of a few multigrid
    cycles, by default one forward and none backward, where the coarse problem's solution is enough to begin at.
    `measure_bias` tells their error, `exactly` and `serial` give what they approximate. In a training, `CycleControl`
    keeps the error within a limit, as `Training` does; without it, rough weights may want `adjoint_cycles=1`.

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
            shape, as a function of them and of its parameters alone; `Direct(F)` makes u_i = F(u_{i-1}). F may use a
            parameter twice, but each layer has its own.
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
            a block that is no function which makes new modules of one size, or with buffers or random numbers, as
            BatchNorm and Dropout have them, or with a `step` of its own; when called, inside a transform of
            `torch.func`, or a block that changes the shape of features.
        RuntimeError: features of another width, dtype or device, from PyTorch itself; a backward pass with
            `create_graph`, or a second one without `retain_graph`.

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
        self._template = Template(own[0])
        self.stack = stack_parameters(own)
        self._prepare()
        self._fused_kind = fused_kind(own[0])
        self._dtypes: dict[tuple[Any, ...], torch.dtype] = {}

    def _own_layers(self, block: Callable[[], nn.Module]) -> list[nn.Module]:
        """The modules of this rank's layers; all are made, so that random numbers are those of the serial network."""
        own = []
        for i, layer in enumerate(make_layers(block, self.num_steps)):
            if self.grid.begin <= i < self.grid.end:
                own.append(layer)
        check_fresh(own)
        return own

    def _prepare(self) -> None:
        """The functions of many layers at once, and whether they drop anything in training."""
        block = self.template
        self._seeded = seeded_copies(block)
        self.step = layer_step(self._seeded[0], seeded=True) if self._seeded else layer_step(block)
        self.step_by_autograd = self.step if self._seeded else layer_step(block, by_hand=False)

    def __getstate__(self) -> dict[str, Any]:
        left = ("step", "step_by_autograd", "_seeded")
        return {key: value for key, value in self.__dict__.items() if key not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare()

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply all weights by a number: near zero, layers are alike, and coarse levels see what fine ones do."""
        for stack in self.stacks:
            stack.mul_(factor)

    def forward(self, u: Tensor, *args: Any) -> Tensor:
        """The features after all layers, (batch, ...), on all ranks. Collective.

        Further arguments go to the block of every layer, and are equal on all ranks; tensors among them get gradients.
        """
        return self._solve(u, args, trajectory=False)[0]

    def trajectory(self, u: Tensor, *args: Any) -> Tensor:
        """The features after each layer of this rank, (n_local, batch, ...). Collective."""
        return self._solve(u, args, trajectory=True)[1]

    def _solve(self, u: Tensor, args: Sequence[Any], trajectory: bool) -> tuple[Tensor, Tensor]:
        (solver,), u = self.solvers, u.to(self._state_dtype(u, args))
        drops = bool(self._seeded) and self.training
        if args or drops:
            return self._solve_given(u, args, drops, trajectory)
        if self._is_fused(u, trajectory):
            refuse_transforms()
            solver.residuals, solver.misfits = ([], []), (0.0, 0.0)
            end = FusedChain.apply(self._fused_kind, self.Tf / self.num_steps, _samples_last(u), *self.stacks)
            return end.mT.reshape(u.shape), u.new_empty(0)
        words = {"trajectory": trajectory, "exact": self.is_exact}
        step = self.step_by_autograd if autocast_state(u.device.type)["enabled"] else self.step
        if not isinstance(step, DenseStep):
            return solve_layers(solver, step, u, self.stacks, **words)
        end, states = solve_layers(solver, step, _samples_last(u), self.stacks, **words)
        return end.mT.reshape(u.shape), states.mT.reshape(-1, *u.shape) if trajectory else states

    def _solve_given(self, u: Tensor, args: Sequence[Any], drops: bool, trajectory: bool) -> tuple[Tensor, Tensor]:
        """As `_solve`, with what this call gives to all layers: arguments, and a seed for dropout."""
        (solver,), controls = self.solvers, list(self.stacks)
        seed = self.grid.mpi.bcast(int(torch.randint(1 << 62, ()))) if drops else None
        if drops:
            controls.append(torch.arange(self.grid.begin, self.grid.end, device=u.device) * NUMBER)
        trained = [k for k, value in enumerate(args) if isinstance(value, Tensor) and value.requires_grad]
        shared, call = [args[k] for k in trained], GivenCall(args, trained, seed)
        step = layer_step((self._seeded or [self.template])[0], False, bool(self._seeded), call)
        return solve_layers(solver, step, u, controls, shared, trajectory=trajectory, exact=self.is_exact)

    def _is_fused(self, u: Tensor, trajectory: bool) -> bool:
        """Whether all layers go through one compiled loop: exact, on one rank, where that is cheaper."""
        if self._fused_kind is None or self.settings.fused == "never" or trajectory or self.grid.mpi.size > 1:
            return False
        (solver,) = self.solvers
        approximates = not self.is_exact and not solver.is_serial and solver.factors
        cycles = (solver.forward.cycles, solver.adjoint.cycles) if approximates else None
        return is_cheaper(u, self.stacks, cycles) and not autocast_state(u.device.type)["enabled"]

    def _state_dtype(self, u: Tensor, args: Sequence[Any]) -> torch.dtype:
        """The dtype of features between layers, by the first layer of this rank, which refuses what PyTorch refuses.

        Raises:
            InputError: a block that changes the shape of features.
        """
        stacks = self.stacks
        key = (
            u.shape,
            u.dtype,
            u.device,
            *[(s.dtype, s.device) for s in stacks],
            *autocast_state(u.device.type).items(),
        )
        if key not in self._dtypes:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                value = with_parameters(self.template)(u.detach().clone(), *(stack[0] for stack in stacks), args=args)
            if not isinstance(value, Tensor) or value.shape != u.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError("block", f"features {tuple(u.shape)} that become {got}", "features of the same shape")
            direct = isinstance(self.template, Direct)
            self._dtypes[key] = value.dtype if direct else torch.promote_types(u.dtype, value.dtype)
        return self._dtypes[key]

    def extra_repr(self) -> str:
        block = " ".join(repr(self.template).split())
        return f"num_steps={self.num_steps}, Tf={self.Tf}, factors={self.solvers[0].factors}, block={block}"


def _samples_last(u: Tensor) -> Tensor:
    """Features (..., width) as (width, samples): see `densestep`."""
    return u.reshape(-1, u.shape[-1]).mT.contiguous()


#: Layers are numbered by a control that is so small that no measure of the weights sees it, and exact as a power of 2.
NUMBER = 2.0**-70


@dataclass(frozen=True)
class GivenCall:
    """What one call of a network gives to all layers.

    Attributes:
        args: of the block.
        trained: which of them get gradients, and come as shared parameters of the steps.
        seed: of dropout; None for none.
    """

    args: Sequence[Any] = ()
    trained: Sequence[int] = ()
    seed: int | None = None

    def split(self, theta: Sequence[Tensor], shared: Sequence[Tensor]) -> tuple[Sequence[Tensor], Given]:
        """The parameters of the layers, and what is given to them."""
        args, keys = list(self.args), None
        for k, value in zip(self.trained, shared):
            args[k] = value
        if self.seed is not None:
            *theta, numbers = theta
            keys = layer_keys(self.seed, (numbers.detach() / NUMBER).round())
        return theta, Given(args, keys)


def seeded_copies(block: nn.Module) -> list[nn.Module]:
    """A copy of a block whose dropout is a function of seeds, in a list; none of one that drops nothing."""
    copied = copy.deepcopy(block)
    return [copied] if seed_dropout(copied) else []


def layer_step(
    block: nn.Module, by_hand: bool = True, seeded: bool = False, call: GivenCall = GivenCall()
) -> LayerStep:
    """The step of layers like `block`, for many of them at once.

    Args:
        block: F of u + dt F(u), or `Direct(F)`.
        by_hand: whether dense blocks get derivatives by hand, which know nothing of autocast.
        seeded: whether its dropout is that of `seeded_copies`.
        call: what is given besides features and parameters; numbers of the layers are the last control where it has a
            seed.

    Raises:
        InputError: another block with a `step` of its own, or one that is no function of features and parameters.
    """
    if by_hand and not seeded and is_dense(block):
        return DenseStep(block)  # type: ignore[arg-type]
    changes_features = any(getattr(part, "inplace", False) for part in block.modules())

    def own(u: Tensor) -> Tensor:  # what a block changes in place are the features of its own layer
        return u.clone() if changes_features else u

    many = batched(block, seeded)

    def value(u: Tensor, theta: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        parameters, given = call.split(theta, shared)
        return many(u, parameters, given)

    if isinstance(block, Direct):
        return AutogradStep(lambda u, theta, shared, dt: value(own(u), theta, shared))
    if isinstance(block, SteppingBlock):
        raise InputError("block with a step of its own", type(block).__name__, "a block F of u + dt F(u), or Direct(F)")

    def step(u: Tensor, theta: Sequence[Tensor], shared: Sequence[Tensor], dt: StepLength) -> Tensor:
        u = own(u)
        return add_scaled(u, value(u, theta, shared), dt)

    def over(shortest: float, u: Tensor, theta: Sequence[Tensor], shared: Sequence[Tensor], dt: StepLength) -> Tensor:
        return two_stages(lambda v, rows: value(v, rows, shared), shortest, u, theta, dt)

    return AutogradStep(step, None if changes_features else over)
