"""Regression of a function of one variable by a ReLU ResNet: what initialization and least squares are worth.

A first layer relu(W x + b), depth - 1 residual layers u + relu(W u + b), and a linear head.

    python -m problems.function_regression -init box -method lsgd -depth 16 -plot regression.png
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn

from nn_adapters.layers.blocks import LayerStack, dense
from nn_adapters.layers.init import INITIALIZATIONS, initialize
from nn_adapters.training.last_layer import lsgd
from pdeopt.control.checkpoint import replace_file
from pdeopt.core.errors import on_root
from pdeopt.core.options import require_all_read
from pdeopt.core.settings import Settings, read, setting
from problems.shared import case as script
from problems.shared import report


def sine(x: Tensor) -> Tensor:
    """sin(2 pi x)."""
    return torch.sin(2.0 * torch.pi * x)


def discontinuous(x: Tensor) -> Tensor:
    """Two polynomials that do not meet at x = 1/2."""
    return torch.where(x < 0.5, 1.0 + x - 4.0 * x**2, 4.0 * (x - 0.75) ** 2 - 1.0)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sine": sine, "discontinuous": discontinuous}


@dataclass(frozen=True)
class RegressionSettings(Settings):
    """The problem's parameters."""

    function: str = setting("sine", "what to learn on [0, 1]", choices=tuple(FUNCTIONS))
    init: str = setting("box", "where the weights start", choices=INITIALIZATIONS)
    method: str = setting(
        "lsgd", "Adam for the hidden layers and least squares for the head, or Adam for all", choices=("adam", "lsgd")
    )
    depth: int = setting(4, "hidden layers", at_least=1)
    width: int = setting(16, "neurons of a layer", at_least=1)
    points: int = setting(256, "samples, equally spaced", at_least=2)
    steps: int = setting(200, "gradient steps", at_least=0)
    lr: float = setting(1e-3, "learning rate of Adam", above=0)
    seed: int = setting(0, "of the random numbers", at_least=0)
    summary: str = setting("", "write a summary to this .json file")
    plot: str = setting("", "write a picture to this .png, .pdf or .svg file")


class Regression:
    """The samples and the network of the settings.

    Attributes:
        x, y: samples, (points, 1).
        hidden, head: the network in two parts.
    """

    def __init__(self, settings: RegressionSettings) -> None:
        self.settings = settings
        self.x = torch.linspace(0.0, 1.0, settings.points, dtype=torch.float64)[:, None]
        self.y = FUNCTIONS[settings.function](self.x)
        self.hidden, self.head = make_network(settings.width, settings.depth)
        generator = torch.Generator().manual_seed(settings.seed)
        initialize(self.hidden, settings.init, generator)
        initialize(self.head, "he" if settings.init == "he" else "glorot", generator)

    def train(self) -> list[float]:
        """Mean squared errors: at the start, and after each step."""
        settings = self.settings
        if settings.method == "lsgd":
            return lsgd(self.hidden, self.head, self.x, self.y, settings.steps, settings.lr)
        network = nn.Sequential(self.hidden, self.head)
        optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr)
        losses = []
        for _ in range(settings.steps):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(network(self.x), self.y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return [*losses, float(nn.functional.mse_loss(self.fit(), self.y))]

    def fit(self) -> Tensor:
        """The network at the samples, (points, 1)."""
        with torch.no_grad():
            return self.head(self.hidden(self.x))  # type: ignore[no-any-return]


def make_network(width: int, depth: int) -> tuple[nn.Sequential, nn.Linear]:
    """Hidden layers, depth of them, and head, in double precision."""
    hidden = nn.Sequential(nn.Linear(1, width), nn.ReLU())
    if depth > 1:  # steps of length 1: u + relu(W u + b)
        hidden.append(LayerStack(lambda: dense(width, "relu"), depth - 1, Tf=depth - 1))
    return hidden.double(), nn.Linear(width, 1).double()


def main(argv: Sequence[str] | None = None) -> float:
    """Train the network of the options and return the root of the mean squared error."""
    with script.command_line(argv, __doc__, (RegressionSettings, "Regression")):
        settings = read(RegressionSettings)
        require_all_read()
        report.check_targets(MPI.COMM_WORLD, settings)
        begin = time.perf_counter()
        regression = Regression(settings)
        losses = regression.train()
        seconds = time.perf_counter() - begin
        on_root(MPI.COMM_WORLD, lambda: _write(regression, losses, seconds))
        PETSc.Sys.Print(
            f"{settings.function}, {settings.init}, {settings.method}: "
            f"RMS error {losses[-1] ** 0.5:.3e} ({seconds:.2f} s)"
        )
        return losses[-1] ** 0.5


def _write(regression: Regression, losses: list[float], seconds: float) -> None:
    settings = regression.settings
    if settings.plot:
        replace_file(settings.plot, _picture(regression, losses))
    if settings.summary:
        replace_file(settings.summary, (json.dumps(_summary(settings, losses, seconds), indent=2) + "\n").encode())


def _summary(settings: RegressionSettings, losses: list[float], seconds: float) -> dict[str, Any]:
    parameters = {key: value for key, value in asdict(settings).items() if key not in ("summary", "plot")}
    return {
        "problem": {"name": "function_regression", **parameters},
        "rms_error": _finite(losses[-1] ** 0.5),
        "wall_time_s": seconds,
        "versions": report.versions(),
        "history": {"rms_error": [_finite(loss**0.5) for loss in losses]},
    }


def _finite(value: float) -> float | None:
    """A number that every JSON reader takes."""
    return value if math.isfinite(value) else None


def _picture(regression: Regression, losses: list[float]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.8), layout="constrained")
    left.plot(regression.x[:, 0], regression.y[:, 0], ".", markersize=3, label="samples")
    left.plot(regression.x[:, 0], regression.fit()[:, 0], label="network")
    left.set(xlabel="x", title=f"{regression.settings.init}, {regression.settings.method}")
    left.legend()
    right.semilogy([max(loss, 1e-34) ** 0.5 for loss in losses])
    right.set(xlabel="step", title="RMS error")
    right.grid(True, alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(regression.settings.plot).suffix[1:], dpi=120)
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    script.start(main)
