"""What modules with parallel layers or time steps have in common: solvers, exact solves, the error of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from nn_adapters.layers.layer_mgrit import LayerMgrit
from pdeopt.steps.timegrid import TimeGrid


class ParallelModule(nn.Module):
    """A module whose layers or time steps are solved in parallel.

    Attributes:
        solvers: of its chains of steps, in order. Their cycles may be changed between calls, as
            `network.solvers[0].forward.cycles = 2`.
        grid: which steps are those of this rank, `grid.begin` to `grid.end`, and its communicator, `grid.mpi`.
    """

    solvers: list[LayerMgrit]
    grid: TimeGrid

    @property
    def residuals(self) -> tuple[list[float], list[float]]:
        """Relative residuals of the first chain's last forward and adjoint solve, where a tolerance asks for them."""
        return self.solvers[0].residuals


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
    began inside, its backward pass is exact, too.

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


def measure_bias(network: nn.Module, loss: Callable[[], Tensor]) -> float:
    """The relative error of the gradient of `loss()`, |g - g_exact| / |g_exact|. Collective.

    g_exact comes from exact solves. The `.grad` of the parameters and the state of the solvers are left as they were.

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
    error = sum(float((a - b).square().sum()) for a, b in zip(inexact, exact))
    size = sum(float(b.square().sum()) for b in exact)
    sums = torch.tensor([error, size], dtype=torch.float64)
    for solver in mgrit_solvers(network)[:1]:
        sums = solver.grid.sum(sums)
    return float((sums[0] / sums[1].clamp(min=1e-300)).sqrt())
