"""What the scripts `problems.pinn_*` share: options, training, resampling, checkpoints, and what is written.

Every rank has the network and its points; the ranks share the local solves of additive SPQN.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

import nn_adapters as nna
import pdeopt as po
from pdeopt.core import Section, interruptible, require_memory, sections
from pdeopt.core.memory import DOUBLE
from pdeopt.optimize.descent import Adam, Minimizer
from problems.shared import pictures
from problems.shared.checkpoints import DescentCheckpoints, method_fingerprint
from problems.shared.command_line import command_line, finish
from problems.shared.equations import EQUATIONS, Equation
from problems.shared.files import CheckpointFiles, ReportFiles, check_targets, versions, write_report
from problems.shared.optimizers import Optimizers

#: Gradients of a run, unless the options say otherwise.
MAX_GRADIENTS = 5000

#: Of SPQN: dense matrices, and one sweep of local solves, at the start; see docs/benchmarks.md for what they are worth.
SPQN_DEFAULTS = {"method": "ssbroyden", "type": "multiplicative", "local": "ssbroyden", "local_it": 10, "every": 10**9}


def optimizers(parts: int) -> Optimizers:
    """The optimizers that are offered, with this many parts for SPQN."""
    return Optimizers(
        {
            "lbfgs": (po.LBFGS, {}),
            "ssbroyden": (po.SSBroyden, {}),
            "spqn": (po.SPQN, {**SPQN_DEFAULTS, "parts": parts}),
            "tr": (po.TrustRegionMinimizer, {}),
            "adam": (Adam, {}),
        },
        stop={"max_it": 10**9, "gtol": 1e-14, "max_gradients": MAX_GRADIENTS},
    )


OPTIMIZERS = tuple(optimizers(1))


@dataclass(frozen=True)
class PinnSettings(po.Settings):
    """The network, its points, and how it is trained."""

    optimizer: str = po.setting("ssbroyden", "optimizer", choices=OPTIMIZERS)
    max_gradients: int = po.setting(
        MAX_GRADIENTS, "gradients at most, of parts too; 0 for no limit; -opt_max_gradients wins", at_least=0
    )
    target_error: float = po.setting(0.0, "relative error at which to stop", at_least=0)
    points: int = po.setting(10_000, "points where the equation is to hold", at_least=1)
    sampler: str = po.setting("hammersley", "how points are drawn", choices=tuple(nna.POINT_SAMPLERS))
    resample_every: float = po.setting(
        0.0, "work from one drawing of new points, where the residual is large, to the next; 0: never", at_least=0
    )
    resample_power: float = po.setting(1.0, "k of the density |r|^k / mean + c of new points", at_least=0)
    resample_floor: float = po.setting(1.0, "c of the density |r|^k / mean + c of new points", at_least=0)
    layers: int = po.setting(0, "hidden layers; 0: as published", at_least=0)
    width: int = po.setting(0, "neurons of a hidden layer; 0: as published", at_least=0)
    body: str = po.setting("resnet", "plain layers, or residual ones", choices=nna.NETWORK_BODIES)
    activation: str = po.setting("tanh", "activation of the hidden layers", choices=tuple(nna.JET_ACTIVATIONS))
    adaptive: bool = po.setting(True, "learn a slope of the activation in each layer")
    slope_scale: float = po.setting(1.0, "n of the activation act(n slope z)", above=0)
    point_levels: int = po.setting(
        0,
        "levels of points, each half of the next, for quasi-Newton methods to begin on; 1: "
        "all points alone; 0: 3 for spqn, 1 for the others",
        at_least=0,
    )
    seed: int = po.setting(0, "seed of all random numbers", at_least=0)
    error_every: float = po.setting(100.0, "work from one measurement of the error to the next", above=0)


def options(name: str) -> list[Section]:
    """All that the script of an equation reads."""
    offered = optimizers(EQUATIONS[name].parts).options(PinnSettings().optimizer)
    files = [*sections(ReportFiles), *sections(CheckpointFiles, checkpoint_every=100)]
    return [*sections(PinnSettings), *offered, *files]


def main(name: str, doc: str | None, argv: Sequence[str] | None = None) -> float:
    """Train a network on an equation as the options say; the relative error of the result."""
    with command_line(argv, doc, options(name)):
        settings, report = po.read(PinnSettings), po.read(ReportFiles)
        checkpoints = po.read(CheckpointFiles, checkpoint_every=100)
        check_targets(MPI.COMM_WORLD, report, checkpoints)
        training = PinnTraining(EQUATIONS[name], settings, checkpoints)
        po.require_all_read()
        with interruptible():
            result = training.run()
        write_report(MPI.COMM_WORLD, report, summary(training, result), lambda: _picture(training, result))
        last, error = result.history[-1], training.error(result.design)
        PETSc.Sys.Print(
            f"{name}: relative error {error:.3e}, loss {training.loss(result):.3e} after "
            f"{last.gradients} gradients, work {last.work:.0f} ({training.spent[0]:.1f} s); "
            f"{result.message}"
        )
        training.checkpoints.leave()
        finish(name, result.reason > 0, result.message)
        return error


def _require_room(equation: Equation, settings: PinnSettings) -> None:
    """Refuse sizes that cannot fit: weights, and at each point all layers with their derivatives by the inputs."""
    layers, width = settings.layers or equation.layers, settings.width or equation.width
    derivatives = 1 + len(equation.derivatives)
    given = f"{settings.points} and {layers} layers of width {width}"
    needed = DOUBLE * layers * width * (settings.points * derivatives + width)
    require_memory(needed, "-points, -layers, -width", given, "smaller ones")
    if settings.point_levels > settings.points.bit_length():
        legal = f"at most {settings.points.bit_length()}: each has half the points of the next"
        raise po.InputError("-point_levels", settings.point_levels, legal)


class Clock:
    """Seconds of the wall clock and of the processor, over restarts."""

    def __init__(self, wall: float = 0.0, processor: float = 0.0) -> None:
        self._begin = time.perf_counter() - wall, time.process_time() - processor

    @property
    def wall(self) -> float:
        """Seconds of the wall clock."""
        return time.perf_counter() - self._begin[0]

    @property
    def processor(self) -> float:
        """Seconds of the processor."""
        return time.process_time() - self._begin[1]


class PinnTraining:
    """The training of a network on one equation.

    Attributes:
        function: the loss at its present points.
        minimizer: that goes down on it.
        errors: (record, relative error) where it was measured.
        clock: seconds since the start.
        spent: seconds of the wall clock and of the processor, when `run` has ended.
        checkpoints: of the run.
    """

    def __init__(self, equation: Equation, settings: PinnSettings, files: CheckpointFiles) -> None:
        _require_room(equation, settings)
        self.equation, self.settings = equation, settings
        self.function = equation.function(
            settings.points,
            settings.layers,
            settings.width,
            settings.body,
            settings.activation,
            settings.adaptive,
            settings.slope_scale,
            settings.sampler,
            settings.seed,
        )
        self.minimizer = self._minimizer()
        self.errors: list[tuple[int, float]] = []
        self.drawings, self._measured, self._drawn = 0, -math.inf, 0.0
        self.clock, self.spent = Clock(), (0.0, 0.0)
        self.checkpoints = DescentCheckpoints(files, MPI.COMM_WORLD, self._fingerprint(), self._memory)

    def _minimizer(self) -> Minimizer:
        name, limit = self.settings.optimizer, self.settings.max_gradients
        offered = optimizers(min(self.equation.parts, self.function.network.depth))
        team = MPI.COMM_WORLD if name == "spqn" else None
        return offered.make(name, self._levels(), team, max_gradients=limit)

    def _levels(self) -> po.SmoothFunction:
        """The function at all of its points and, on coarser levels, at fewer."""
        settings, number = self.settings, self.settings.point_levels or (3 if self.settings.optimizer == "spqn" else 1)
        if number == 1:
            return self.function
        draw = nna.POINT_SAMPLERS[settings.sampler]
        sizes = [max(settings.points >> level, 1) for level in range(1, number)]
        coarser = [self.function.with_points(draw(n, self.equation.box, settings.seed)) for n in sizes]
        same = [po.Transfer.aggregates(np.arange(self.function.size))] * len(coarser)
        return po.Hierarchy([self.function, *coarser], same)

    def run(self) -> po.Result:
        """Train to the end, with new points as often as the settings say."""
        going_on = self.checkpoints.resume()
        if self.checkpoints.run_before is not None:
            self._recall(self.checkpoints.run_before)
        start = self.function.initial(self.settings.seed)
        while True:
            result = self.minimizer.minimize(start, observers=[self._observe], until=self._until, **going_on)
            if not (result.converged and self._is_due() and not self._is_good_enough()):
                self.spent = self.clock.wall, self.clock.processor
                self.checkpoints.end(self.equation.name, result)
                return result
            result.history.records[-1] = replace(result.history[-1], note="start")  # of another function
            going_on = {"memory": self._draw(), "history": result.history}

    def error(self, theta: Tensor) -> float:
        """|u - u*| / |u*|."""
        return self.equation.relative_error(self.function, theta)

    def loss(self, result: po.Result) -> float:
        """The loss at all points, where the run may not have come to; not counted."""
        return self.function._value(result.design)

    def _observe(self, minimizer: Minimizer, history: po.History) -> None:
        record = history[-1]
        if record.work >= self._measured + self.settings.error_every:
            self._measured = record.work
            self.errors.append((record.iteration, self.error(minimizer.x)))
            PETSc.Sys.Print(
                f"work {record.work:8.0f}  loss {record.objective:9.3e}  relative error "
                f"{self.errors[-1][1]:9.3e}  {self.clock.wall:7.1f} s"
            )
        self.checkpoints.observe(minimizer, history)

    def _until(self, minimizer: Minimizer) -> bool:
        return self._is_good_enough() or self._is_due()

    def _is_good_enough(self) -> bool:
        return bool(self.errors) and self.errors[-1][1] <= self.settings.target_error

    def _is_due(self) -> bool:
        every = self.settings.resample_every
        return every > 0 and self.minimizer.spent().work >= self._drawn + every - 1e-6  # sums are rounded

    def _draw(self) -> dict[str, Any]:
        """New points, all of them from now on; the method goes on with all that it knows, and with f and f' there."""
        minimizer, settings = self.minimizer, self.settings
        self.drawings += 1
        points = nna.adaptive_points(
            lambda x: self.function.residuals(minimizer.x, x),
            settings.points,
            self.equation.box,
            settings.seed + 1000 * self.drawings,
            settings.resample_power,
            settings.resample_floor,
        )
        self.function = self.function.with_points(points)
        f, g = self.function.value_and_gradient(minimizer.x)
        memory = minimizer.memory()
        value = f / memory["unit"]
        memory |= {"f": value, "g": g / memory["unit"], "highest": value} | ({"level": 0} if "level" in memory else {})
        self._drawn = minimizer.spent().work
        minimizer.attach(self.function)
        return memory

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        free = ("max_gradients", "target_error", "error_every")
        own = {f.name: getattr(self.settings, f.name) for f in fields(PinnSettings) if f.name not in free}
        return {"problem": self.equation.name, **own, **method_fingerprint(self.minimizer)}

    def _memory(self) -> dict[str, Any]:
        """What the training remembers beside the minimizer."""
        return {
            "points": self.function.terms[0].points,
            "errors": self.errors,
            "seconds": (self.clock.wall, self.clock.processor),
            "state": [self.drawings, self._measured, self._drawn],
        }

    def _recall(self, memory: dict[str, Any]) -> None:
        points, like = memory["points"], self.function.terms[0].points
        if points.shape[1:] != like.shape[1:] or points.dtype != like.dtype:
            raise po.InputError("-restart", f"points of shape {tuple(points.shape)}", f"(n, {like.shape[1]})")
        self.function = self.function.with_points(points)
        self.minimizer.attach(self._levels())
        self.errors = [tuple(pair) for pair in memory["errors"]]
        self.clock = Clock(*memory["seconds"])
        self.drawings, self._measured, self._drawn = memory["state"]


# -- what is written ---------------------------------------------------------------------------------------


def summary(training: PinnTraining, result: po.Result) -> dict[str, Any]:
    """The run as JSON values."""
    last, measured = result.history[-1], dict(training.errors)
    return {
        "problem": training.equation.name,
        "optimizer": training.settings.optimizer,
        "relative_l2": training.error(result.design),
        "loss": training.loss(result),
        "start_loss": result.history[0].objective,
        "gradients": last.gradients,
        "values": last.values,
        "hessian_products": last.hessian_products,
        "work": last.work,
        "seconds": training.spent[0],
        "cpu_seconds": training.spent[1],
        "iterations": last.iteration,
        "unknowns": training.function.size,
        "reason": int(result.reason),
        "message": result.message,
        "parameters": {**vars(training.settings), **vars(training.minimizer.settings)},
        "versions": versions(),
        "history": result.history.columns()
        | {"relative_l2": [measured.get(iteration) for iteration in result.history["iteration"]]},
    }


def _picture(training: PinnTraining, result: po.Result) -> Any:
    """The solution, the network and its error, the points, and loss and error over the work."""
    equation, function, shape = training.equation, training.function, (256, 101)
    x = equation.grid(shape)
    u, exact = (each.view(shape).T.numpy() for each in (function.predict(result.design, x), equation.solution(x)))
    extent = tuple(np.ravel(equation.box))
    figure = pictures.new_figure(16.0, 3.4)
    axes = figure.subplots(1, 5)
    images = [pictures.Panel(title, values, extent) for title, values in (("solution", exact), ("network", u))]
    colors = pictures.shared_colors([exact, u])
    drawn = [image.draw(axis, colors) for image, axis in zip(images, axes)]
    figure.colorbar(drawn[0], ax=axes[:2])
    figure.colorbar(pictures.error_image(axes[2], u - exact, extent=extent, aspect="auto"), ax=axes[2])
    axes[3].plot(*function.terms[0].points.T, ".", markersize=1)
    axes[3].set(title="points")
    for axis in axes[:4]:
        axis.set(xlabel=equation.names[0], ylabel=equation.names[1])
    history = result.history
    axes[4].loglog([1 + w for w in history["work"]], history["objective"], label="loss")
    work = dict(zip(history["iteration"], history["work"]))
    points = np.array([(1 + work[iteration], error) for iteration, error in training.errors])
    axes[4].loglog(*points.T, "o-", label="relative error", markersize=4)
    axes[4].set(title=training.settings.optimizer, xlabel="work in full gradients")
    axes[4].legend()
    axes[4].grid(True, alpha=0.3)
    figure.suptitle(f"{equation.name}: relative error {training.error(result.design):.2e}")
    return figure
