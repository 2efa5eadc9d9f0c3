"""What the scripts `problems.pinn_*` share: options, training, resampling, checkpoints, and what is written.

Every rank has the network and its points; the ranks share the local solves of additive SPQN.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from nn_adapters.pinn.jets import JET_ACTIVATIONS
from nn_adapters.pinn.network import NETWORK_BODIES
from nn_adapters.pinn.points import POINT_SAMPLERS, adaptive_points
from pdeopt.control.checkpoint import read_memory, replace_file, write_memory
from pdeopt.core.monitor import History, Result
from pdeopt.core.options import require_all_read
from pdeopt.core.settings import Settings, read, setting
from pdeopt.functions.hierarchy import Hierarchy, Transfer
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.descent.minimizer import Minimizer, StopSettings
from problems.shared import report
from problems.shared.case import command_line
from problems.shared.equations import CASES, Case

#: Module and class by the names in options.
OPTIMIZERS = {
    "lbfgs": ("pdeopt.optimize.descent.quasinewton", "LBFGS"),
    "ssbroyden": ("pdeopt.optimize.descent.quasinewton", "SSBroyden"),
    "spqn": ("pdeopt.optimize.descent.schwarz", "SPQN"),
    "tr": ("pdeopt.optimize.descent.trust", "TrustRegionMinimizer"),
    "adam": ("pdeopt.optimize.descent.adam", "Adam"),
}


#: Of SPQN: dense matrices, and one sweep of local solves, at the start; see docs/benchmarks.md for what they are worth.
SPQN_DEFAULTS = {"method": "ssbroyden", "type": "multiplicative", "local": "ssbroyden", "local_it": 10, "every": 10**9}


@dataclass(frozen=True)
class PinnSettings(Settings):
    """The network, its points, and how it is trained."""

    optimizer: str = setting("ssbroyden", "method, with options -lbfgs_*, -ssbroyden_*, ...", choices=tuple(OPTIMIZERS))
    max_gradients: int = setting(5000, "gradients at most, of parts too; 0 for no limit", at_least=0)
    target_error: float = setting(0.0, "stop at this relative error", at_least=0)
    points: int = setting(10_000, "where the equation is to hold", at_least=1)
    sampler: str = setting("hammersley", "of the points", choices=tuple(POINT_SAMPLERS))
    resample_every: float = setting(
        0.0, "work from one drawing of new points, where the residual is large, to the next; 0: never", at_least=0
    )
    resample_power: float = setting(1.0, "k of the density |r|^k / mean + c", at_least=0)
    resample_floor: float = setting(1.0, "c of the density |r|^k / mean + c", at_least=0)
    layers: int = setting(0, "hidden layers; 0: as published", at_least=0)
    width: int = setting(0, "of each; 0: as published", at_least=0)
    body: str = setting("resnet", "plain layers, or residual ones", choices=NETWORK_BODIES)
    activation: str = setting("tanh", "activation", choices=tuple(JET_ACTIVATIONS))
    adaptive: bool = setting(True, "a slope of the activation, to be learned, in each layer")
    slope_scale: float = setting(1.0, "n of the activation act(n slope z)", above=0)
    point_levels: int = setting(
        0,
        "levels of points, each half of the next, for quasi-Newton methods to begin on; 1: "
        "all points alone; 0: 3 for spqn, 1 for the others",
        at_least=0,
    )
    seed: int = setting(0, "of all random numbers", at_least=0)
    error_every: float = setting(100.0, "work from one measurement of the error to the next", above=0)


@dataclass(frozen=True)
class FileSettings(Settings):
    """What is written and read."""

    summary: str = setting("", "write a summary to this .json file")
    plot: str = setting("", "write a picture to this .png, .pdf or .svg file")
    checkpoint: str = setting("", "write checkpoints to this file")
    checkpoint_every: int = setting(100, "iterations from checkpoint to checkpoint", at_least=1)
    restart: str = setting("", "go on from this checkpoint")


def main(name: str, doc: str | None, argv: Sequence[str] | None = None) -> float:
    """Train a network on an equation as the options say; the relative error of the result."""
    sections = (PinnSettings, name), (StopSettings, "Stopping, -opt_*"), (FileSettings, "Files")
    with command_line(argv, doc or "", *sections):
        settings, files = read(PinnSettings), read(FileSettings)
        report.check_targets(MPI.COMM_WORLD, files)
        training = Training(CASES[name], settings, files)
        require_all_read()
        result = training.run()
        training.write(result)
        return training.error(result.design)


class Training:
    """One run.

    Attributes:
        function: the loss at its present points.
        minimizer: that goes down on it.
        errors: (record, relative error) where it was measured.
        spent: seconds of the clock and of the processor, over restarts, when `run` has ended.
    """

    def __init__(self, case: Case, settings: PinnSettings, files: FileSettings) -> None:
        self.case, self.settings, self.files = case, settings, files
        self.function = case.function(
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
        self._seconds, self._begin = (0.0, 0.0), self._clocks()
        self.spent = self._seconds

    def _minimizer(self) -> Minimizer:
        module, name = OPTIMIZERS[self.settings.optimizer]
        words: dict[str, Any] = {"max_it": 10**9, "max_gradients": self.settings.max_gradients, "gtol": 1e-14}
        if self.settings.optimizer == "spqn":
            words |= SPQN_DEFAULTS | {"parts": min(self.case.parts, self.function.network.depth)}
            words["team"] = MPI.COMM_WORLD
        made: Minimizer = getattr(import_module(module), name)(self._levels(), **words)
        return made

    def _levels(self) -> SmoothFunction:
        """The function at all of its points and, on coarser levels, at fewer."""
        settings, number = self.settings, self.settings.point_levels or (3 if self.settings.optimizer == "spqn" else 1)
        if number == 1:
            return self.function
        draw = POINT_SAMPLERS[settings.sampler]
        sizes = [max(settings.points >> level, 1) for level in range(1, number)]
        coarser = [self.function.with_points(draw(n, self.case.box, settings.seed)) for n in sizes]
        same = [Transfer.aggregates(np.arange(self.function.size))] * len(coarser)
        return Hierarchy([self.function, *coarser], same)

    def run(self) -> Result:
        """Train to the end, with new points as often as the settings say."""
        memory, history = self._restore() if self.files.restart else (None, None)
        start = self.function.initial(self.settings.seed)
        while True:
            result = self.minimizer.minimize(
                start, observers=[self._observe], until=self._until, memory=memory, history=history
            )
            if not (result.converged and self._is_due() and not self._is_good_enough()):
                self.spent = self.seconds
                return result
            memory, history = self._draw(), result.history

    def error(self, theta: Tensor) -> float:
        """|u - u*| / |u*|."""
        return self.case.relative_error(self.function, theta)

    def _observe(self, minimizer: Minimizer, history: History) -> None:
        record = history[-1]
        if record.work >= self._measured + self.settings.error_every:
            self._measured = record.work
            self.errors.append((record.iteration, self.error(minimizer.x)))
            PETSc.Sys.Print(
                f"work {record.work:8.0f}  loss {record.objective:9.3e}  relative error "
                f"{self.errors[-1][1]:9.3e}  {self.seconds[0]:7.1f} s"
            )
        if self.files.checkpoint and record.iteration % self.files.checkpoint_every == 0:
            self._save(minimizer, history)

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
        points = adaptive_points(
            lambda x: self.function.residuals(minimizer.x, x),
            settings.points,
            self.case.box,
            settings.seed + 1000 * self.drawings,
            settings.resample_power,
            settings.resample_floor,
        )
        self.function = self.function.with_points(points)
        f, g = self.function.value_and_gradient(minimizer.x)
        memory = minimizer.memory() | {"f": f, "g": g, "level": 0}
        self._drawn = minimizer.spent().work
        minimizer.attach(self.function)
        return memory

    @property
    def seconds(self) -> tuple[float, float]:
        """Wall clock and processor since the start, over restarts."""
        now = self._clocks()
        wall, processor = (done + end - begin for done, end, begin in zip(self._seconds, now, self._begin))
        return wall, processor

    def _clocks(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        free = ("max_gradients", "target_error", "error_every")
        own = {f.name: getattr(self.settings, f.name) for f in fields(PinnSettings) if f.name not in free}
        return {"problem": self.case.name, **own}

    def _save(self, minimizer: Minimizer, history: History) -> None:
        own = {
            "run.points": self.function.terms[0].points,
            "run.errors": self.errors,
            "run.seconds": self.seconds,
            "run.state": [self.drawings, self._measured, self._drawn],
        }
        memory = minimizer.memory() | own  # collective
        if MPI.COMM_WORLD.rank == 0:
            write_memory(self.files.checkpoint, self._fingerprint(), memory, history)

    def _restore(self) -> tuple[dict[str, Any], History]:
        memory, history = read_memory(self.files.restart, self._fingerprint())
        self.function = self.function.with_points(memory.pop("run.points"))
        self.minimizer.attach(self._levels())
        self.errors = [tuple(pair) for pair in memory.pop("run.errors")]
        self._seconds = tuple(memory.pop("run.seconds"))
        self.drawings, self._measured, self._drawn = memory.pop("run.state")
        return memory, history

    # -- what is written -----------------------------------------------------------------------------------

    def write(self, result: Result) -> None:
        """A line, and what the options ask for."""
        error, last, files = self.error(result.design), result.history[-1], self.files
        is_first = MPI.COMM_WORLD.rank == 0
        if files.plot and is_first:
            replace_file(files.plot, _picture(Path(files.plot).suffix, self, result))
        if files.summary and is_first:
            text = json.dumps(report._json(self.summary(result)), indent=2) + "\n"
            replace_file(files.summary, text.encode())
        PETSc.Sys.Print(
            f"{self.case.name}: relative error {error:.3e}, loss {self.loss(result):.3e} after "
            f"{last.gradients} gradients, work {last.work:.0f} ({self.spent[0]:.1f} s); "
            f"{result.message}"
        )

    def loss(self, result: Result) -> float:
        """At all points, where the run may not have come to; not counted."""
        return self.function._value(result.design)

    def summary(self, result: Result) -> dict[str, Any]:
        """The run as JSON values."""
        last, measured = result.history[-1], dict(self.errors)
        return {
            "problem": self.case.name,
            "optimizer": self.settings.optimizer,
            "relative_l2": self.error(result.design),
            "loss": self.loss(result),
            "start_loss": result.history[0].objective,
            "gradients": last.gradients,
            "values": last.values,
            "hessian_products": last.hessian_products,
            "work": last.work,
            "seconds": self.spent[0],
            "cpu_seconds": self.spent[1],
            "iterations": last.iteration,
            "unknowns": self.function.size,
            "reason": int(result.reason),
            "message": result.message,
            "parameters": {**vars(self.settings), **vars(self.minimizer.settings)},
            "versions": report.versions(),
            "history": result.history.columns()
            | {"relative_l2": [measured.get(iteration) for iteration in result.history["iteration"]]},
        }


def _picture(ending: str, training: Training, result: Result) -> bytes:
    """The solution, its error, the points, and loss and error over the work."""
    from matplotlib.figure import Figure

    case, function, shape = training.case, training.function, (256, 101)
    x = case.grid(shape)
    u, exact = function.predict(result.design, x), case.solution(x)
    extent = tuple(np.ravel(case.box))
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    images = {"network": u, "log10 of the error": (u - exact).abs().clamp(min=1e-12).log10()}
    axes = figure.subplots(1, 4)
    for axis, (title, values) in zip(axes, images.items()):
        image = axis.imshow(values.view(shape).T, origin="lower", extent=extent, aspect="auto")
        axis.set(title=title, xlabel=case.names[0], ylabel=case.names[1])
        figure.colorbar(image)
    axes[2].plot(*function.terms[0].points.T, ",")
    axes[2].set(title="points", xlabel=case.names[0], ylabel=case.names[1])
    history = result.history
    axes[3].loglog([1 + w for w in history["work"]], history["objective"], label="loss")
    work = dict(zip(history["iteration"], history["work"]))
    points = np.array([(1 + work[iteration], error) for iteration, error in training.errors])
    axes[3].loglog(*points.T, "o-", label="relative error")
    axes[3].set(title=training.settings.optimizer, xlabel="work in full gradients")
    axes[3].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending[1:], dpi=120)
    return buffer.getvalue()
