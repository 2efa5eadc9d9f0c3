"""Regression of a function of one variable by a ReLU ResNet: what initialization and least squares are worth.

A first layer relu(W x + b), depth - 1 residual layers u + relu(W u + b), and a linear head.

    python -m problems.function_regression -init box -method lsgd -depth 16 -plot regression.png
    python -m problems.function_regression -method lm -steps 50
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.training import load_checkpoint, save_checkpoint
from pdeopt.core import Interrupted, Section, interruptible, require_memory, sections
from pdeopt.core.memory import DOUBLE
from pdeopt.optimize.descent import StopSettings
from problems.shared import pictures
from problems.shared.checkpoints import DescentCheckpoints, method_fingerprint
from problems.shared.command_line import command_line, finish, start
from problems.shared.files import CheckpointFiles, ReportFiles, check_targets, tell_finished, versions, write_report
from problems.shared.optimizers import method_options, under

#: Steps from checkpoint to checkpoint.
EVERY = 100

#: A run without checkpoints.
NO_FILES = CheckpointFiles()


def sine(x: Tensor) -> Tensor:
    """sin(2 pi x)."""
    return torch.sin(2.0 * torch.pi * x)


def discontinuous(x: Tensor) -> Tensor:
    """Two polynomials that do not meet at x = 1/2."""
    return torch.where(x < 0.5, 1.0 + x - 4.0 * x**2, 4.0 * (x - 0.75) ** 2 - 1.0)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sine": sine, "discontinuous": discontinuous}


@dataclass(frozen=True)
class RegressionSettings(po.Settings):
    """The problem's parameters."""

    function: str = po.setting("sine", "what to learn on [0, 1]", choices=tuple(FUNCTIONS))
    init: str = po.setting("box", "where the weights start", choices=nna.INITIALIZATIONS)
    method: str = po.setting(
        "lsgd",
        "Adam for the hidden layers and least squares for the head; Adam for all; Levenberg-Marquardt for all",
        choices=("adam", "lsgd", "lm"),
    )
    depth: int = po.setting(4, "hidden layers", at_least=1)
    width: int = po.setting(16, "neurons of a layer", at_least=1)
    points: int = po.setting(256, "samples, equally spaced", at_least=2)
    steps: int = po.setting(200, "gradient steps, or iterations of lm at most", at_least=0)
    lr: float = po.setting(1e-3, "learning rate of Adam", above=0)
    seed: int = po.setting(0, "seed of the random numbers", at_least=0)


class Regression:
    """The samples and the network of the settings.

    Attributes:
        x, y: samples, (points, 1).
        hidden, head: the network in two parts.
    """

    def __init__(self, settings: RegressionSettings) -> None:
        width, depth = settings.width, settings.depth
        given = f"{width}, {depth}, {settings.points}"
        needed = DOUBLE * width * (width + settings.points) * depth
        require_memory(needed, "-width, -depth, -points", given, "smaller ones")
        self.settings, self._lm = settings, list[Any]()
        if settings.method == "lm":
            self._lm = [po.read(po.LevenbergMarquardt.Settings), po.read(StopSettings, max_it=settings.steps)]
        self.x = torch.linspace(0.0, 1.0, settings.points, dtype=torch.float64)[:, None]
        self.y = FUNCTIONS[settings.function](self.x)
        self.hidden, self.head = make_network(settings.width, settings.depth)
        generator = torch.Generator().manual_seed(settings.seed)
        nna.initialize(self.hidden, settings.init, generator)
        nna.initialize(self.head, "he" if settings.init == "he" else "glorot", generator)

    def train(self, kept: CheckpointFiles = NO_FILES) -> list[float]:
        """Mean squared errors: at the start, and after each step; a signal ends them early.

        Args:
            kept: files of checkpoints.

        Raises:
            InputError: a file to restart from that is none of this problem.
        """
        settings, network = self.settings, nn.Sequential(self.hidden, self.head)
        if settings.method == "lm":
            return self._least_squares(network, kept)
        lsgd = nna.LSGD(self.hidden, self.head, self.x, self.y, settings.lr) if settings.method == "lsgd" else None
        optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr) if lsgd is None else lsgd.optimizer
        self.files = kept.of_run(MPI.COMM_WORLD, "step")
        comm, own = MPI.COMM_WORLD, {name: value for name, value in asdict(settings).items() if name != "steps"}
        print_of = {"problem": "function_regression", **own}
        losses: list[float] = []
        if kept.restart:
            losses += load_checkpoint(kept.restart, network, optimizer, comm, print_of)[0]["losses"]
        elif lsgd is not None:
            losses.append(lsgd.solve_head())
        before, steps = len(losses), settings.steps + (lsgd is not None)

        def save() -> None:
            save_checkpoint(kept.checkpoint, network, optimizer, comm, print_of, {"losses": losses})

        with contextlib.suppress(Interrupted):
            while len(losses) < steps:
                losses.append(self._adam_step(network, optimizer) if lsgd is None else _lsgd_step(lsgd))
                self.files.after(len(losses), save)
        self.files.end(len(losses), save)
        if kept.restart and len(losses) == before and not self.files.signal:
            tell_finished("function_regression")
        return losses if lsgd is not None else [*losses, float(nn.functional.mse_loss(self.fit(), self.y))]

    def _least_squares(self, network: nn.Module, kept: CheckpointFiles) -> list[float]:
        """Levenberg-Marquardt for all weights."""
        loss = nna.NetworkLoss(network, nn.functional.mse_loss, self.x, self.y)
        method = po.LevenbergMarquardt(nna.NetworkSquares(loss), *self._lm)
        own = {name: value for name, value in asdict(self.settings).items() if name != "steps"}
        print_of = {"problem": "function_regression", **own, **method_fingerprint(method)}
        checkpoints = DescentCheckpoints(kept, MPI.COMM_WORLD, print_of, kind=method.Record)
        result = method.minimize(loss.parameters(), observers=[checkpoints.observe], **checkpoints.resume())
        checkpoints.end("function_regression", result)
        self.files = checkpoints.file
        loss.assign(result.design)
        return [float(value) for value in result.history["objective"]]

    def _adam_step(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """A step for all weights; the error before it."""
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(network(self.x), self.y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def fit(self) -> Tensor:
        """The network at the samples, (points, 1)."""
        with torch.no_grad():
            return self.head(self.hidden(self.x))  # type: ignore[no-any-return]


def _lsgd_step(method: nna.LSGD) -> float:
    """A step for the hidden layers and a solve for the head; the error after it."""
    method.step_hidden()
    return method.solve_head()


def make_network(width: int, depth: int) -> tuple[nn.Sequential, nn.Linear]:
    """Hidden layers, depth of them, and head, in double precision."""
    hidden = nn.Sequential(nn.Linear(1, width), nn.ReLU())
    if depth > 1:  # steps of length 1: u + relu(W u + b)
        hidden.append(nna.LayerStack(lambda: nna.dense(width, "relu"), depth - 1, Tf=depth - 1))
    return hidden.double(), nn.Linear(width, 1).double()


#: What Levenberg-Marquardt reads.
LEAST_SQUARES = [Section(StopSettings, defaults={"max_it": None}), *method_options(po.LevenbergMarquardt)]
OPTIONS = [
    *sections(RegressionSettings),
    *under((("method", "lm"),), LEAST_SQUARES),
    *sections(ReportFiles),
    *sections(CheckpointFiles, checkpoint_every=EVERY),
]


def main(argv: Sequence[str] | None = None) -> float:
    """Train the network of the options and return the root of the mean squared error."""
    with command_line(argv, __doc__, OPTIONS):
        settings, report = po.read(RegressionSettings), po.read(ReportFiles)
        kept = po.read(CheckpointFiles, checkpoint_every=EVERY)
        check_targets(MPI.COMM_WORLD, report, kept)
        begin = time.perf_counter()
        regression = Regression(settings)
        po.require_all_read()
        with interruptible():
            losses = regression.train(kept)
        seconds = time.perf_counter() - begin
        found = summary(settings, losses, seconds)
        write_report(MPI.COMM_WORLD, report, found, lambda: _picture(regression, losses))
        PETSc.Sys.Print(
            f"{settings.function}, {settings.init}, {settings.method}: "
            f"RMS error {losses[-1] ** 0.5:.3e} ({seconds:.2f} s)"
        )
        regression.files.leave()
        finish("function_regression", math.isfinite(losses[-1]), "the error is not finite: a smaller -lr")
        return losses[-1] ** 0.5


def summary(settings: RegressionSettings, losses: list[float], seconds: float) -> dict[str, Any]:
    """The run as values of JSON."""
    return {
        "problem": {"name": "function_regression", **asdict(settings)},
        "rms_error": losses[-1] ** 0.5,
        "wall_time_s": seconds,
        "versions": versions(),
        "history": {"rms_error": [loss**0.5 for loss in losses]},
    }


def _picture(regression: Regression, losses: list[float]) -> Any:
    """Samples and network, and the error over the steps."""
    figure = pictures.new_figure(8.4, 3.8)
    left, right = figure.subplots(1, 2)
    left.plot(regression.x[:, 0], regression.y[:, 0], ".", markersize=3, label="samples")
    left.plot(regression.x[:, 0], regression.fit()[:, 0], label="network")
    left.set(xlabel="x", title=f"{regression.settings.init}, {regression.settings.method}")
    left.legend()
    right.semilogy([loss**0.5 for loss in losses], nonpositive="mask")
    right.set(xlabel="step", title="RMS error")
    right.grid(True, alpha=0.3)
    return figure


if __name__ == "__main__":
    start(main)
