"""Networks trained as control problems, `-solver sqp`: Gauss-Newton steps on weights, or on weights and features.

A dense residual network is a `LayerConstraint` with opening and head as global parameters; other networks go through
derivatives of PyTorch. Work is counted in gradients, with the prices of `nn_adapters.control`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.control import DenseNetwork
from pdeopt.core import Interrupted, Section, interruptible, interruption
from pdeopt.functions import CurvedFunction
from pdeopt.optimize import CurvedSettings, curved_function
from pdeopt.optimize.descent import StopSettings
from pdeopt.optimize.squares import GaussNewtonSettings
from problems.shared import pictures
from problems.shared.files import ReportFiles, write_report


@dataclass(frozen=True)
class ControlSettings(po.Settings):
    """Training as a control problem."""

    control_weight: float = po.setting(
        1e-5, "price alpha of weights: sum_k dt alpha/2 |z_k|^2, and alpha/2 |p|^2 of opening and head", above=0
    )
    max_cpu_seconds: float = po.setting(0.0, "seconds of the processor at most; 0 for no limit", at_least=0)


@dataclass(frozen=True)
class TrainedBySettings(po.Settings):
    """How the network is trained."""

    solver: str = po.setting(
        "epochs",
        "epochs of -optimizer in batches; or as a control problem, by damped Gauss-Newton steps on all -samples (first "
        "weights of the layers are then not scaled)",
        choices=("epochs", "sqp"),
        reads={"sqp": (ControlSettings, Section(GaussNewtonSettings), Section(StopSettings), Section(CurvedSettings))},
    )


@dataclass(frozen=True)
class AsControl:
    """What a script says of its network as a control problem.

    Attributes:
        data: (its settings, files of data, seed) -> samples; None for those of the script.
        defaults: of the script's own settings.
        stop: of `StopSettings`.
        method: of `GaussNewtonSettings`.
        parts: classifier -> opening, layers, head of a dense residual network; None for any other network.
    """

    data: Callable[..., nna.Dataset] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    stop: dict[str, Any] = field(default_factory=lambda: {"max_it": 200})
    method: dict[str, Any] = field(default_factory=dict)
    parts: Callable[[nn.Module], tuple[nn.Module, nn.Module, nn.Module]] | None = None


def dense_control(
    opening: nn.Module, layers: Any, head: nn.Module, x: Tensor, y: Tensor, weight: float, smoothness: float = 0.0
) -> tuple[po.ControlProblem, Tensor]:
    """The control problem of a dense residual network on the ranks of MPI, and its first design on this rank.

    Args:
        opening, head: modules before and after the layers.
        layers: a `LayerParallel` on one process, whose weights are the first ones.
        x, y: samples and classes.
        weight: price of the weights.
        smoothness: price of how they change from layer to layer, see `SmoothCost`; 0 for none.
    """
    stack = layers.serial()
    grid = po.TimeGrid.uniform(len(stack), stack.dt * len(stack))
    constraint = nna.LayerConstraint(stack.layers[0], x, opening, head, smooth=smoothness > 0.0)
    price = po.SmoothCost(weight, smoothness) if smoothness else po.ControlCost(weight)
    objective = nna.classification_loss(constraint, None, y) + price + nna.ParameterCost(weight)
    problem = po.ControlProblem(constraint, objective, grid, po.Jumps(grid, constraint.weights) if smoothness else None)
    own = nna.control_of(stack.layers)[grid.begin : grid.end].reshape(-1)
    return problem, torch.cat([own, constraint.first_parameters()[: problem.layout.param_size]])


class SqpTraining:
    """One run: the function, its start, and the curve of what was reached by which work.

    Args:
        network: a classifier on this process, with its first weights.
        how: what the script says.
        data: samples.
        samples: for training; 0 for all.
        smoothness: price of how weights change from layer to layer.

    Raises:
        InputError: a price of what a network without dense layers has not.
    """

    def __init__(
        self, network: nn.Module, how: AsControl, data: nna.Dataset, samples: int, smoothness: float = 0.0
    ) -> None:
        self.settings, self.data = po.read(ControlSettings), data
        rows = slice(0, samples or None)
        x, y, weight = data.x_train[rows], data.y_train[rows], self.settings.control_weight
        self.problem: po.ControlProblem | None = None
        self.function: CurvedFunction
        if how.parts is None:
            if smoothness:
                raise po.InputError("-smoothness", f"{smoothness:g} with -solver sqp", "0, for this network")
            self.function = nna.NetworkFunction(network, nna.CrossEntropy(), x, y, weight)
            self.start = self.function.parameters()
        else:
            self.problem, self.start = dense_control(*how.parts(network), x, y, weight, smoothness)
            self.function = curved_function(self.problem)
        self.method = po.GaussNewton(self.function, **how.stop, **how.method)
        self.curve: list[dict[str, float]] = []
        self.signal, self.is_spent, self._measuring = 0, False, 0.0

    def run(self) -> Any:
        """Train; the result of the method."""
        self._begin = time.process_time()
        return self.method.minimize(self.start, observers=[self._observe], until=self._is_spent)

    def accuracy(self, x: Tensor) -> float:
        """Of a design on the test samples. Collective."""
        function = self.function
        assert isinstance(function, (DenseNetwork, nna.NetworkFunction))
        return float((function.outputs(x, self.data.x_test).argmax(1) == self.data.y_test).double().mean())

    def _observe(self, method: Any, history: Any) -> None:
        record, now = history[-1], time.process_time()
        seconds = now - self._begin - self._measuring
        entry = {"iteration": record.iteration, "work": record.work, "cpu_seconds": seconds}
        self.curve.append(entry | {"objective": record.objective, "test_accuracy": self.accuracy(method.x)})
        PETSc.Sys.Print(
            f"{record.iteration:4d}  objective {record.objective:.6f}  test accuracy "
            f"{self.curve[-1]['test_accuracy']:.4f}  work {record.work:7.1f}  {seconds:7.2f} CPU s  {record.note}"
        )
        self._measuring += time.process_time() - now
        self.signal = interruption(MPI.COMM_WORLD)
        if self.signal:
            raise Interrupted(self.signal)

    def _is_spent(self, method: Any) -> bool:
        """Whether the first rank's time is over."""
        most = self.settings.max_cpu_seconds
        self.is_spent = bool(MPI.COMM_WORLD.bcast(0 < most <= self.curve[-1]["cpu_seconds"]))
        return self.is_spent


def train(name: str, training: SqpTraining, report: ReportFiles, parameters: dict[str, Any]) -> tuple[float, str]:
    """Train, write the report; the test accuracy, and why the run failed, empty where it has done what it was to do.

    Collective. Raises `Interrupted` after a signal, when the report is written.
    """
    with interruptible():
        result = training.run()
    summary = _summary(name, training, result, parameters)
    write_report(MPI.COMM_WORLD, report, summary, lambda: _picture(name, training.curve))
    last = training.curve[-1]
    PETSc.Sys.Print(
        f"{name}: test accuracy {last['test_accuracy']:.4f}, objective {last['objective']:.6f} after "
        f"{result.iterations} steps, the work of {last['work']:.0f} gradients ({last['cpu_seconds']:.2f} CPU s)"
    )
    if training.signal:
        raise Interrupted(training.signal)
    is_done = result.reason > 0 or result.reason == po.Reason.DIVERGED_MAX_IT
    return last["test_accuracy"], "" if is_done else result.message


def _summary(name: str, training: SqpTraining, result: Any, parameters: dict[str, Any]) -> dict[str, Any]:
    function, last, curve = training.function, training.curve[-1], training.curve
    found = {
        "problem": name,
        "solver": "sqp",
        "reason": "the seconds of -max_cpu_seconds are spent" if training.is_spent else result.message,
        "objective": last["objective"],
        "test_accuracy": last["test_accuracy"],
        "steps": result.iterations,
        "work": last["work"],
        "products": result.history[-1].hessian_products,
        "cpu_seconds": last["cpu_seconds"],
        "ranks": MPI.COMM_WORLD.size,
        "curve": curve,
        "parameters": parameters | {f"gn_{key}": value for key, value in asdict(training.method.settings).items()},
    }
    if isinstance(function, DenseNetwork):
        count = function.chain.count
        found |= {"sequential_layers": count.layers, "sweeps": count.sweeps, "cycles": count.cycles}
        if function.carries and training.problem is not None:  # at a first point states are solved for
            found["reduced_objective"] = curved_function(training.problem).value(result.design)
    return found


def _picture(name: str, curve: list[dict[str, float]]) -> Any:
    """Objective and accuracy by work."""
    figure = pictures.new_figure(8.0, 3.6)
    left, right = figure.subplots(1, 2)
    work = [each["work"] for each in curve]
    left.semilogy(work, [each["objective"] for each in curve], nonpositive="mask")
    left.set(title="objective", xlabel="work, in gradients")
    right.plot(work, [each["test_accuracy"] for each in curve])
    right.set(title="test accuracy", xlabel="work, in gradients")
    for axis in (left, right):
        axis.grid(True, alpha=0.3)
    figure.suptitle(f"{name}: test accuracy {curve[-1]['test_accuracy']:.4f}")
    return figure
