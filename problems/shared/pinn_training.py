"""What the scripts `problems.pinn_*` share: options, training, resampling, checkpoints, and what is written.

Every rank has the network and its points; the ranks share the rows of `lm`, and the local solves of additive SPQN.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

import nn_adapters as nna
import pdeopt as po
from pdeopt.core import Section, interruptible, sections
from pdeopt.optimize.descent import Minimizer
from problems.shared import pictures
from problems.shared.checkpoints import DescentCheckpoints, method_fingerprint
from problems.shared.command_line import command_line, finish
from problems.shared.equation import Equation, NoisyData
from problems.shared.equations import EQUATIONS
from problems.shared.files import CheckpointFiles, ReportFiles, check_targets, versions, write_report
from problems.shared.pinn_settings import LEVELED, SHARED, PinnSettings, chosen, optimizers, require_room


def options(name: str) -> list[Section]:
    """All that the script of an equation reads."""
    offered = optimizers(EQUATIONS[name].parts).options("auto")
    files = [*sections(ReportFiles), *sections(CheckpointFiles, checkpoint_every=100)]
    measured = sections(NoisyData) if EQUATIONS[name].coefficients else []
    return [*sections(PinnSettings), *measured, *offered, *files]


def main(name: str, doc: str | None, argv: Sequence[str] | None = None) -> float:
    """Train a network on an equation as the options say; the relative error of the result."""
    with command_line(argv, doc, options(name)):
        settings, report = po.read(PinnSettings), po.read(ReportFiles)
        checkpoints = po.read(CheckpointFiles, checkpoint_every=100)
        check_targets(MPI.COMM_WORLD, report, checkpoints)
        measured = po.read(NoisyData) if EQUATIONS[name].coefficients else None
        training = PinnTraining(EQUATIONS[name], settings, checkpoints, measured)
        po.require_all_read()
        with interruptible():
            result = training.run()
        write_report(MPI.COMM_WORLD, report, summary(training, result), lambda: _picture(training, result))
        last, error = result.history[-1], training.error(result.design)
        steps = f"{last.gradients} gradients" if last.gradients else f"{last.iteration} iterations"
        PETSc.Sys.Print(
            f"{name}: relative error {error:.3e}, loss {training.loss(result):.3e} after {steps}, work {last.work:.0f} "
            f"({training.spent[0]:.1f} s); {result.message}"
        )
        for unknown, value in training.function.coefficients_at(result.design).items():
            PETSc.Sys.Print(
                f"{unknown} {value:.6g}, off by {abs(value - training.equation.coefficients[unknown][1]):.1e}"
            )
        training.checkpoints.leave()
        finish(name, result.reason > 0, result.message)
        return error


class Clock:
    """Seconds of the wall clock and of the processor, over restarts."""

    def __init__(self, wall: float = 0.0, processor: float = 0.0) -> None:
        self._begin = [time.perf_counter() - wall, time.process_time() - processor]

    def without(self, call: Callable[[], float]) -> float:
        """The number that a call returns, whose seconds are not counted."""
        wall, processor = time.perf_counter(), time.process_time()
        found = call()
        self._begin[0] += time.perf_counter() - wall
        self._begin[1] += time.process_time() - processor
        return found

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
        errors: (iteration, relative error, seconds of the processor) where it was measured.
        clock: seconds since the start.
        spent: seconds of the wall clock and of the processor, when `run` has ended.
        checkpoints: of the run.
    """

    def __init__(
        self, equation: Equation, settings: PinnSettings, files: CheckpointFiles, measured: NoisyData | None = None
    ) -> None:
        settings = chosen(equation, settings)
        require_room(equation, settings)
        self.equation, self.settings, self.measured = equation, settings, measured
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
            settings.features,
            measured,
            settings.device,
        )
        self.minimizer = self._minimizer()
        self.errors: list[tuple[int, float, float]] = []
        self.is_spent = False
        self.drawings, self._measured, self._drawn = 0, -math.inf, 0.0
        self.clock, self.spent = Clock(), (0.0, 0.0)
        self.checkpoints = DescentCheckpoints(
            files, MPI.COMM_WORLD, self._fingerprint(), self._memory, self.minimizer.Record
        )

    def _minimizer(self) -> Minimizer:
        name, limit = self.settings.optimizer, self.settings.max_gradients
        offered = optimizers(min(self.equation.parts, self.function.network.depth))
        team = MPI.COMM_WORLD if name in SHARED else None
        return offered.make(name, self._levels(), team, max_gradients=limit, **self._seed())

    def _seed(self) -> dict[str, int]:
        """Of the points that the method itself draws."""
        return {"seed": self.settings.seed} if self.settings.optimizer == "lm" else {}

    def _levels(self) -> po.SmoothFunction:
        """The function at all of its points and, on coarser levels, at fewer."""
        settings, number = self.settings, self.settings.point_levels or (3 if self.settings.optimizer in LEVELED else 1)
        if number == 1:
            return self.function
        draw = self.equation.points
        sizes = [max(settings.points >> level, 1) for level in range(1, number)]
        coarser = [self.function.with_points(draw(settings.sampler, n, settings.seed)) for n in sizes]
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
                if self.is_spent and result.reason == po.Reason.CONVERGED_TARGET:
                    result.reason, result.message = po.Reason.WORK_DONE, "-max_cpu_seconds are spent"
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
            self._measured, seconds = record.work, self.clock.processor
            self.errors.append((record.iteration, self.clock.without(lambda: self.error(minimizer.x)), seconds))
            PETSc.Sys.Print(
                f"work {record.work:8.0f}  loss {record.objective:9.3e}  relative error "
                f"{self.errors[-1][1]:9.3e}  {self.clock.wall:7.1f} s"
            )
        self.checkpoints.observe(minimizer, history)

    def _until(self, minimizer: Minimizer) -> bool:
        most = self.settings.max_cpu_seconds
        self.is_spent = most > 0 and MPI.COMM_WORLD.allreduce(self.clock.processor, MPI.MAX) >= most
        return self.is_spent or self._is_good_enough() or self._is_due()

    def _is_good_enough(self) -> bool:
        return bool(self.errors) and self.errors[-1][1] <= self.settings.target_error

    def _is_due(self) -> bool:
        every = self.settings.resample_every
        return (
            every > 0 and not self.is_spent and self.minimizer.spent().work >= self._drawn + every - 1e-6
        )  # sums are rounded

    def _draw(self) -> dict[str, Any]:
        """New points, all of them from now on; the method goes on with all that it knows, and with f and f' there."""
        minimizer, settings = self.minimizer, self.settings
        self.drawings += 1
        points = nna.adaptive_points(
            lambda x: self.function.residuals(minimizer.x, x).reshape(-1, len(x)).norm(dim=0),
            settings.points,
            self.equation.box,
            settings.seed + 1000 * self.drawings,
            settings.resample_power,
            settings.resample_floor,
            sampler=self.equation.sampler(),
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
        free = ("max_gradients", "max_cpu_seconds", "target_error", "error_every", "device")
        own = {f.name: getattr(self.settings, f.name) for f in fields(PinnSettings) if f.name not in free}
        own |= vars(self.measured) if self.measured is not None else {}
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
    last = result.history[-1]
    measured = {iteration: (error, seconds) for iteration, error, seconds in training.errors}
    rows = [record for record in result.history.records if record.iteration in measured]
    return {
        "problem": training.equation.name,
        "optimizer": training.settings.optimizer,
        "relative_l2": training.error(result.design),
        "loss": training.loss(result),
        **_coefficients(training, result),
        "start_loss": result.history[0].objective,
        "gradients": last.gradients,
        "values": last.values,
        "hessian_products": last.hessian_products,
        **{name: getattr(last, name) for name in ("jacobians", "products", "factorizations") if hasattr(last, name)},
        "work": last.work,
        "seconds": training.spent[0],
        "cpu_seconds": training.spent[1],
        "iterations": last.iteration,
        "unknowns": training.function.size,
        "reason": int(result.reason),
        "message": result.message,
        "parameters": {
            **vars(training.settings),
            **(vars(training.measured) if training.measured else {}),
            **vars(training.minimizer.settings),
        },
        "versions": versions(),
        "curve": {
            "cpu_seconds": [measured[record.iteration][1] for record in rows],
            "work": [record.work for record in rows],
            "loss": [record.objective for record in rows],
            "relative_l2": [measured[record.iteration][0] for record in rows],
        },
        "history": result.history.columns()
        | {"relative_l2": [measured.get(iteration, (None,))[0] for iteration in result.history["iteration"]]},
    }


def _coefficients(training: PinnTraining, result: po.Result) -> dict[str, Any]:
    """Those that were unknown, and what they miss the true ones by; of logarithms, relative errors of the number."""
    found = training.function.coefficients_at(result.design)
    missed = {name: abs(found[name] - true) for name, (_, true) in training.equation.coefficients.items()}
    return {"coefficients": found, "coefficient_errors": missed} if found else {}


def _picture(training: PinnTraining, result: po.Result) -> Any:
    """The solution, the network and its error, the points, and loss and error over the work."""
    equation, function, shape = training.equation, training.function, (256, 101)
    x = equation.grid(shape)
    here = torch.ones(len(x), dtype=torch.bool) if equation.inside is None else equation.inside(x)

    def on_grid(values: Tensor) -> Any:
        """The first field, nothing outside of the domain."""
        found = torch.full((len(x),), torch.nan, dtype=torch.float64)
        found[here] = values.reshape(-1, int(here.sum()))[0]
        return found.view(shape).T.numpy()

    u, exact = on_grid(function.predict(result.design, x[here])), on_grid(equation.solution(x[here]))
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
    points = np.array([(1 + work[iteration], error) for iteration, error, _ in training.errors])
    axes[4].loglog(*points.T, "o-", label="relative error", markersize=4)
    axes[4].set(title=training.settings.optimizer, xlabel="work in full gradients")
    axes[4].legend()
    axes[4].grid(True, alpha=0.3)
    figure.suptitle(f"{equation.name}: relative error {training.error(result.design):.2e}")
    return figure
