"""What modules with parallel layers or time steps have in common: solvers, exact solves, the error of gradients."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.layers.layer_mgrit import LayerMgrit
from nn_adapters.layers.parts.splines import spline_coefficients
from nn_adapters.layers.parts.stacking import ParameterStack
from pdeopt.core.errors import InputError
from pdeopt.steps.timegrid import TimeGrid


class ParallelModule(nn.Module):
    """A module whose layers or time steps are solved in parallel.

    In training, values and gradients are those of its cycles. In `eval()` mode and under `no_grad` they are those of
    the serial network, to rounding: one step after the other, on the same ranks.

    Attributes:
        solvers: of its chains of steps, in order. Their cycles may be changed between calls, as
            `network.solvers[0].forward.cycles = 2`.
        grid: which steps are those of this rank, `grid.begin` to `grid.end`, and its communicator, `grid.mpi`.
        approximate: whether the cycles serve in `eval()` mode and under `no_grad`, too, where speed is wanted.
    """

    solvers: list[LayerMgrit]

    def __init__(self, approximate: bool = False) -> None:
        super().__init__()
        self.approximate = approximate

    @property
    def grid(self) -> TimeGrid:
        """Which steps are those of this rank, and its communicator."""
        return self.solvers[0].grid

    @property
    def residuals(self) -> tuple[list[float], list[float]]:
        """Relative residuals of the first chain's last forward and adjoint solve, where a tolerance asks for them."""
        return self.solvers[0].residuals

    @property
    def is_exact(self) -> bool:
        """Whether a call, as things stand, goes one step after the other."""
        return not (self.approximate or (self.training and torch.is_grad_enabled()))

    @abstractmethod
    def serial(self) -> nn.Module:
        """The same function as PyTorch runs it, with copies of all weights, on every rank. Collective."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimizer, as the function `parameter_groups` makes them.

        Args:
            weight_decay: of matrices.
        """
        return parameter_groups(self, weight_decay)


def serial_network(network: nn.Module) -> nn.Module:
    """A copy of a network whose parallel parts run as PyTorch runs them, one layer after the other. Collective.

    The way back is `network.load_state_dict(copy.state_dict())`: the keys are the same.

    Args:
        network: any module.

    Example:
        >>> torch.save(serial_network(network), "network.pt")
    """
    replaced = {id(m): m.serial() for m in network.modules() if isinstance(m, ParallelModule)}
    return copy.deepcopy(network, dict(replaced))


def mgrit_solvers(network: nn.Module) -> list[LayerMgrit]:
    """The solvers of all parallel modules inside a network, in the order of its modules.

    Args:
        network: any module; without parallel ones the list is empty.
    """
    return [each for module in network.modules() if isinstance(module, ParallelModule) for each in module.solvers]


@contextmanager
def exactly(network: nn.Module) -> Iterator[None]:
    """Inside, the parallel modules of a network go one step after the other, on the same ranks.

    Nothing is approximated there, so that values and gradients are those of the serial network. Where an evaluation
    began inside, its backward pass is exact, too. `eval()` mode and `no_grad` do the same.

    Args:
        network: any module that contains them.

    Example:
        >>> with exactly(network):
        ...     accuracy = (network(x).argmax(1) == labels).double().mean()
    """
    with ExitStack() as stack:
        for solver in mgrit_solvers(network):
            stack.enter_context(solver.one_by_one())
        yield


@contextmanager
def approximately(network: nn.Module) -> Iterator[None]:
    """Inside, the parallel modules of a network are solved by their cycles in `eval()` mode and under `no_grad`, too.

    Args:
        network: any module that contains them.

    Example:
        >>> with approximately(network), torch.no_grad():
        ...     fast = network(x)
    """
    modules = [module for module in network.modules() if isinstance(module, ParallelModule)]
    kept = [module.approximate for module in modules]
    for module in modules:
        module.approximate = True
    try:
        yield
    finally:
        for module, value in zip(modules, kept):
            module.approximate = value


def measure_bias(network: nn.Module, loss: Callable[[], Tensor]) -> float:
    """The relative error of the gradient of `loss()` by the cycles, |g - g_exact| / |g_exact|. Collective.

    g_exact comes from exact solves. The `.grad` of the parameters, buffers, the cycles of the solvers and the random
    state are left as they were; the solvers' `misfits` are those of the inexact gradient.

    Args:
        network: whose parameters count, those of this rank.
        loss: evaluates the network and its loss, with the same data each time.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    spread = _spread_parameters(network)

    def gradient() -> list[Tensor]:
        found = torch.autograd.grad(loss(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]

    random = torch.get_rng_state()  # both have the same dropout
    fits = [(solver, solver.fit) for solver in mgrit_solvers(network)]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with exactly(network):
        exact = gradient()
    torch.set_rng_state(random)
    with approximately(network):  # last, so that the solvers' misfits are those of the cycles
        inexact = gradient()
    torch.set_rng_state(random)
    for solver, fit in fits:  # the batch that is measured is learned when it is trained with
        solver.fit = fit
    with torch.no_grad():
        for buffer, kept in buffers:
            buffer.copy_(kept)
    is_spread = [id(p) in spread for p in parameters]
    error = _square(network, [a - b for a, b in zip(inexact, exact)], is_spread)
    size = _square(network, exact, is_spread)
    return float((error / size.clamp(min=1e-300)).sqrt())


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of parameters for an optimizer: matrices, which decay, and biases and norms, which do not.

    A matrix has two axes or more in a module of one layer: the axis of the layers in a `LayerParallel`'s stacks, which
    filters by `p.ndim` would count, does not count. Frozen parameters are left out.

    Args:
        network: any module.
        weight_decay: of the first group, at least 0.

    Raises:
        InputError: a decay below 0.

    Example:
        >>> optimizer = torch.optim.AdamW(parameter_groups(network, weight_decay=0.1), lr=1e-3)
    """
    if not weight_decay >= 0:
        raise InputError("weight_decay", weight_decay, "a number >= 0")
    stacked = stacked_parameters(network)
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in network.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() - (id(parameter) in stacked) >= 2
            (matrices if is_matrix else others).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def clip_grad_norm_(network: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients such that their 2-norm, over the layers of all ranks, is at most `max_norm`. Collective.

    What `torch.nn.utils.clip_grad_norm_` does, which would see the layers of this rank alone. Parameters outside of
    the layers are equal on all ranks and count once.

    Args:
        network: whose `.grad` are scaled in place; those of layers on this rank.
        max_norm: the largest norm.

    Returns:
        The norm before.
    """
    gradients = {id(p): p.grad for p in network.parameters() if p.grad is not None}
    spread = _spread_parameters(network)
    norm = _square(network, list(gradients.values()), [at in spread for at in gradients]).sqrt()
    factor = float((max_norm / (norm + 1e-6)).clamp(max=1.0))
    for g in gradients.values():
        g.mul_(factor)
    return norm


def stacked_parameters(network: nn.Module) -> set[int]:
    """The identities, `id(p)`, of parameters that have a leading axis of layers, or of coefficients of splines.

    Args:
        network: any module; without a `LayerParallel` there are none.
    """
    stacks = (module for module in network.modules() if isinstance(module, ParameterStack))
    return {id(parameter) for stack in stacks for parameter in stack.parameters()}


def _spread_parameters(network: nn.Module) -> set[int]:
    """The identities of parameters of this rank's layers; those of all others are equal on all ranks."""
    return stacked_parameters(network) - {id(each) for each in spline_coefficients(network)}


def _square(network: nn.Module, tensors: Sequence[Tensor], is_spread: Sequence[bool]) -> Tensor:
    """|.|^2 of one tensor a parameter: those of layers over all ranks, the others, equal on all, once. Collective."""
    shares = torch.zeros(2, dtype=torch.float64)
    for tensor, of_layers in zip(tensors, is_spread):
        double = torch.promote_types(tensor.dtype, torch.float64)
        shares[int(of_layers)] += float(torch.linalg.vector_norm(tensor, dtype=double)) ** 2
    for solver in mgrit_solvers(network)[:1]:
        shares[1] = solver.grid.sum(shares[1])
    return shares.sum()
