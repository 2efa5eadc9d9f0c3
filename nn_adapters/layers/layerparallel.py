"""Deep networks whose layers are solved in parallel, as ordinary PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from nn_adapters.layers.batched import batched
from nn_adapters.layers.blocks import Direct, LayerStack
from nn_adapters.layers.densestep import DenseStep, add, is_dense
from nn_adapters.layers.layer_mgrit import Hierarchy, Propagation
from pdeopt.core.errors import InputError
from pdeopt.steps.mgrit import MgritSettings


class LayerParallel(nn.Module):
    """`num_steps` layers u + dt F(u) over the time Tf, dt = Tf / num_steps, solved by MGRIT.

    Loss, optimizer and loop are PyTorch's own. Under MPI every rank calls the module with the same features and gets
    the same result; a rank owns the parameters of its layers, and gradients of what stands before and after the
    layers are equal on all ranks.

    Args:
        comm: an mpi4py or PETSc communicator; None for this process alone.
        block: makes the module F of a layer, as `lambda: dense(8)`; called once a layer, in order, on all ranks.
        num_steps, Tf: layers and time.
        settings: of MGRIT; keywords replace single ones: `LayerParallel(comm, block, 1024, 1.0, coarsening="16")`.

    The `state_dict` has the keys of `LayerStack`, `layers.{i}.{name}`, on a rank those of its layers; it loads whole
    dictionaries, too.
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
            raise InputError("LayerParallel", f"settings and {', '.join(words)}", "one of both")
        self.block, self.num_steps, self.Tf = block, num_steps, Tf
        self.settings = settings or MgritSettings(**words)
        self.hierarchy = Hierarchy(num_steps, Tf, MPI.COMM_SELF if comm is None else comm, self.settings)
        self.grid = self.hierarchy.grid
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
        """The parameters of this rank's layers, each of shape (n_local, ...)."""
        return [getattr(self, f"stack{at}") for at in range(len(self.names))]

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply all weights: near zero, layers are alike, and coarse levels see what fine ones do."""
        for stack in self.stacks:
            stack.mul_(factor)

    def forward(self, u: Tensor) -> Tensor:
        """The features after all layers, on all ranks. Collective."""
        return self._propagate(u, False)[0]

    def trajectory(self, u: Tensor) -> Tensor:
        """The features after each layer of this rank, shape (n_local, ...). Collective."""
        return self._propagate(u, True)[1]

    def _propagate(self, u: Tensor, states_too: bool) -> tuple[Tensor, Tensor]:
        if u.shape[0] == 0:  # of an empty batch nothing comes
            return u, u.new_empty((self.grid.n_local, *u.shape))
        words = self.hierarchy, self.step, states_too, len(self.stacks)
        if not isinstance(self.step, DenseStep):
            return Propagation.apply(*words, u, *self.stacks)  # type: ignore[no-any-return,no-untyped-call]
        flat = u.reshape(-1, u.shape[-1]).mT.contiguous()  # samples last: see densestep
        end, states = Propagation.apply(*words, flat, *self.stacks)  # type: ignore[no-untyped-call]
        return end.mT.reshape(u.shape), states.mT.reshape(-1, *u.shape) if states_too else states

    def serial(self) -> LayerStack:
        """The network as PyTorch runs it, with copies of all weights, on all ranks. Collective."""
        network = LayerStack(self.block, self.num_steps, self.Tf)
        network.load_state_dict(self.full_state_dict())
        return network.to(self.stacks[0].device, self.stacks[0].dtype)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The state of all layers, on all ranks. Collective."""
        own = self.grid.begin, [stack.detach().cpu().numpy() for stack in self.stacks]
        return {
            f"layers.{begin + row}.{name}": torch.from_numpy(stack[row])
            for begin, stacks in self.grid.mpi.allgather(own)
            for row in range(len(stacks[0]))
            for name, stack in zip(self.names, stacks)
        }

    @property
    def hierarchies(self) -> list[Hierarchy]:
        """The solver of the layers, as all layer-parallel modules show theirs."""
        return [self.hierarchy]

    @property
    def residuals(self) -> tuple[list[float], list[float]]:
        """Relative residuals of the last forward and adjoint solve, where a tolerance asks for them."""
        return self.hierarchy.residuals

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
            elif state_dict[key].shape != self.stacks[at][row].shape:
                error_msgs.append(
                    f"{key}: shape {tuple(state_dict[key].shape)}, {tuple(self.stacks[at][row].shape)} expected"
                )
            else:
                with torch.no_grad():
                    self.stacks[at][row] = state_dict[key]

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, Tf={self.Tf}, factors={self.hierarchy.factors}"


def layer_step(block: nn.Module) -> Any:
    """The step of layers like `block`, for many of them at once."""
    if is_dense(block):
        return DenseStep(block)  # type: ignore[arg-type]
    value = batched(block)
    if isinstance(block, Direct):
        return lambda u, theta, shared, dt: value(u, theta)
    if hasattr(block, "step"):
        raise InputError("block with a step of its own", type(block).__name__, "a block F of u + dt F(u), or Direct(F)")
    return lambda u, theta, shared, dt: add(u, value(u, theta), dt)


def measure_bias(network: nn.Module, loss: Callable[[], Tensor]) -> float:
    """The relative error of the gradient of `loss()` against that of exact solves; gradients are left as they were.

    Args:
        network: whose parameters count, those of this rank.
        loss: evaluates the network and its loss, with the same data each time.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]

    def gradient() -> list[Tensor]:
        found = torch.autograd.grad(loss(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]

    inexact = gradient()
    with exactly(network):
        exact = gradient()
    sums = torch.tensor(
        [
            sum(float((a - b).square().sum()) for a, b in zip(inexact, exact)),
            sum(float(b.square().sum()) for b in exact),
        ],
        dtype=torch.float64,
    )
    for hierarchy in parallel_parts(network)[:1]:
        sums = hierarchy.grid.sum(sums)
    return float((sums[0] / sums[1].clamp(min=1e-300)).sqrt())


def parallel_parts(network: nn.Module) -> list[Hierarchy]:
    """The hierarchies of the layer-parallel parts of a network."""
    return [each for module in network.modules() for each in getattr(module, "hierarchies", ())]


@contextmanager
def exactly(network: nn.Module) -> Iterator[None]:
    """Inside, the layer-parallel parts of a network go one step after the other, on the same ranks."""
    parts = parallel_parts(network)
    for part in parts:
        part.begin_exact()
    try:
        yield
    finally:
        for part in parts:
            part.end_exact()
