"""Deep networks whose layers are solved in parallel, as ordinary PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from nn_adapters.layers.batching import batched
from nn_adapters.layers.blocks import Direct, LayerStack, SteppingBlock
from nn_adapters.layers.densestep import DenseStep, add_scaled, is_dense
from nn_adapters.layers.layer_mgrit import LayerMgrit, solve_layers
from nn_adapters.layers.layerstep import AutogradStep, LayerStep
from nn_adapters.layers.parallelmodule import ParallelModule
from pdeopt.core.errors import InputError
from pdeopt.steps.mgrit import MgritSettings


class LayerParallel(ParallelModule):
    """The residual network u_i = u_{i-1} + dt F(u_{i-1}; z_i), i = 1..N, dt = Tf / N, solved by MGRIT over its layers.

    An ordinary module: loss, optimizer and loop are PyTorch's own. Values and gradients are those of a few multigrid
    cycles; `measure_bias` tells their error, `exactly` and `serial` give what they approximate.

    Calling it is collective over `comm`, and so is the backward pass. Every rank gives the same features u_0 and gets
    the same u_N, of the same shape, in the dtype and on the device of the parameters. A rank owns the parameters of
    its layers and their gradients; those of what stands before and after the layers are equal on all ranks. Optimizers
    that work entry by entry (SGD, Adam, ...) then need no communication; what takes norms over all parameters, as
    gradient clipping does, must sum them over ranks.

    The method is layer-parallel training of S. Guenther, L. Ruthotto, J. B. Schroder, E. C. Cyr, N. R. Gauger
    (SIAM J. Math. Data Sci. 2, 2020) with multigrid reduction in time of R. D. Falgout, S. Friedhoff, T. V. Kolev,
    S. P. MacLachlan, J. B. Schroder (SIAM J. Sci. Comput. 36, 2014).

    Args:
        comm: an mpi4py or PETSc communicator; None for this process alone.
        block: makes the module F of a layer, as `lambda: dense(8)`; called once a layer, in order, on all ranks, so
            that random weights are those of the serial network. F maps features (batch, ...) to features of the same
            shape, as a function of them and of its parameters alone; `Direct(F)` makes u_i = F(u_{i-1}).
        num_steps: layers N.
        Tf: time.
        settings: of MGRIT; keywords replace single ones: `LayerParallel(comm, block, 1024, 1.0, coarsening="16")`.

    Attributes:
        grid: the layers of this rank are `grid.begin` to `grid.end`, `grid.mpi` is the communicator.
        stacks: parameters of the layers of this rank.
        solvers: a list of the one solver.

    State:
        `state_dict` has the keys of `LayerStack`, `layers.{i}.{name}`, on a rank those of its layers. It loads
        dictionaries of all layers as well as those of this rank's; `full_state_dict` gathers all layers.

    Raises:
        InputError: settings and keywords at once; coarsening factors that are not legal; more ranks than intervals;
            a block with buffers or random numbers, as BatchNorm and Dropout have them, or with a `step` of its own.
        RuntimeError: a second backward pass through one evaluation.

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
        **words: Any,
    ) -> None:
        super().__init__()
        if settings is not None and words:
            raise InputError("LayerParallel", f"settings and {', '.join(words)}", "one of the two")
        self.block, self.num_steps, self.Tf = block, num_steps, Tf
        self.settings = settings or MgritSettings(**words)
        self.solvers = [LayerMgrit(num_steps, Tf, MPI.COMM_SELF if comm is None else comm, self.settings)]
        self.grid = self.solvers[0].grid
        own, example = self._own_layers()
        self.names = [name for name, _ in example.named_parameters()]
        for at, name in enumerate(self.names):
            rows = [dict(layer.named_parameters())[name].detach() for layer in own]
            self.register_parameter(f"stack{at}", nn.Parameter(torch.stack(rows)))
        self.step = layer_step(example)

    def _own_layers(self) -> tuple[list[nn.Module], nn.Module]:
        """The modules of this rank's layers, and one of them; all are made, so that random numbers are as in series."""
        own = []
        for i in range(self.num_steps):
            layer = self.block()
            if self.grid.begin <= i < self.grid.end:
                own.append(layer)
        return own, own[0]

    @property
    def stacks(self) -> list[nn.Parameter]:
        """The parameters of this rank's layers, one tensor (n_local, ...) for each parameter of the block."""
        return [getattr(self, f"stack{at}") for at in range(len(self.names))]

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply all weights by a number: near zero, layers are alike, and coarse levels see what fine ones do."""
        for stack in self.stacks:
            stack.mul_(factor)

    def forward(self, u: Tensor) -> Tensor:
        """The features after all layers, (batch, ...), on all ranks. Collective."""
        return self._solve(u, trajectory=False)[0]

    def trajectory(self, u: Tensor) -> Tensor:
        """The features after each layer of this rank, (n_local, batch, ...). Collective."""
        return self._solve(u, trajectory=True)[1]

    def _solve(self, u: Tensor, trajectory: bool) -> tuple[Tensor, Tensor]:
        if u.shape[0] == 0:  # an empty batch
            return u, u.new_empty((self.grid.n_local, *u.shape))
        (solver,) = self.solvers
        if not isinstance(self.step, DenseStep):
            return solve_layers(solver, self.step, u, self.stacks, trajectory=trajectory)
        flat = u.reshape(-1, u.shape[-1]).mT.contiguous()  # samples last: see densestep
        end, states = solve_layers(solver, self.step, flat, self.stacks, trajectory=trajectory)
        return end.mT.reshape(u.shape), states.mT.reshape(-1, *u.shape) if trajectory else states

    def serial(self) -> LayerStack:
        """The network as PyTorch runs it, with copies of all weights, on every rank. Collective."""
        network = LayerStack(self.block, self.num_steps, self.Tf)
        network.load_state_dict(self.full_state_dict())
        return network.to(self.stacks[0].device, self.stacks[0].dtype)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The `state_dict` of all layers, on the CPU of every rank, as that of `serial()`. Collective."""
        own = self.grid.begin, [stack.detach().cpu().numpy() for stack in self.stacks]
        return {
            f"layers.{begin + row}.{name}": torch.from_numpy(stack[row])
            for begin, stacks in self.grid.mpi.allgather(own)
            for row in range(len(stacks[0]))
            for name, stack in zip(self.names, stacks)
        }

    def _keys(self, prefix: str) -> Iterator[tuple[str, int, int]]:
        """(key, stack, row) of the layers of this rank."""
        for row in range(self.grid.n_local):
            for at, name in enumerate(self.names):
                yield f"{prefix}layers.{self.grid.begin + row}.{name}", at, row

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, at, row in self._keys(prefix):
            value = self.stacks[at][row]
            destination[key] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = {f"{prefix}layers.{i}.{name}" for i in range(self.num_steps) for name in self.names}
        unexpected_keys += [key for key in state_dict if key.startswith(prefix + "layers.") and key not in known]
        for key, at, row in self._keys(prefix):
            if key not in state_dict:
                missing_keys.append(key)
                continue
            got, expected = state_dict[key].shape, self.stacks[at].shape[1:]
            if got != expected:
                error_msgs.append(f"{key}: shape {tuple(got)}, {tuple(expected)} expected")
                continue
            with torch.no_grad():
                self.stacks[at][row] = state_dict[key]

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, Tf={self.Tf}, factors={self.solvers[0].factors}"


def layer_step(block: nn.Module) -> LayerStep:
    """The step of layers like `block`, for many of them at once.

    Args:
        block: F of u + dt F(u), or `Direct(F)`.

    Raises:
        InputError: another block with a `step` of its own, or one that is no function of features and parameters.
    """
    if is_dense(block):
        return DenseStep(block)  # type: ignore[arg-type]
    value = batched(block)
    if isinstance(block, Direct):
        return AutogradStep(lambda u, theta, shared, dt: value(u, theta))
    if isinstance(block, SteppingBlock):
        raise InputError("block with a step of its own", type(block).__name__, "a block F of u + dt F(u), or Direct(F)")
    return AutogradStep(lambda u, theta, shared, dt: add_scaled(u, value(u, theta), dt))
