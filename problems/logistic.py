"""Logistic regression with a quadratic regularizer, by methods that sample, and by methods that do not.

    python -m problems.logistic -data australian -data_dir DATA -optimizer astrom
    python -m problems.logistic -data mnist49 -data_dir DATA -optimizer mlvr -summary mnist49.json
    python -m problems.logistic -data generated -optimizer tr
    python -m problems.logistic -data FILE            # in the format of LIBSVM, with two labels

`svrg`, `sarah` and `ssn` are settings of MLVR; their defaults are those, and `-mlvr_*` change them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import torch
from mpi4py import MPI
from petsc4py import PETSc

from nn_adapters.data import datasets, formats, sources
from nn_adapters.losses.logistic import LogisticLoss
from pdeopt.control.checkpoint import replace_file
from pdeopt.core.errors import InputError, on_root
from pdeopt.core.monitor import Result
from pdeopt.core.options import require_all_read
from pdeopt.core.settings import Settings, read, setting
from pdeopt.optimize.descent.astrom import ASTROM
from pdeopt.optimize.descent.minimizer import Minimizer
from pdeopt.optimize.descent.mlvr import MLVR
from pdeopt.optimize.descent.quasinewton import LBFGS
from pdeopt.optimize.descent.trust import TrustRegionMinimizer
from problems.shared import case as script
from problems.shared import report

#: Settings of MLVR that are other methods.
SVRG = {
    "levels": 2,
    "coarse": "gradient",
    "redraw": "step",
    "batch": 1,
    "memory": 0,
    "nested": 0,
    "sampling": "uniform",
}
SARAH = SVRG | {"reference": "previous"}
SSN = {"levels": 2, "coarse": "newton", "redraw": "cycle", "memory": 0, "nested": 0, "sampling": "uniform"}

#: Optimizers by name, with defaults that differ from their own.
OPTIMIZERS: dict[str, tuple[type[Minimizer], dict[str, Any]]] = {
    "astrom": (ASTROM, {}),
    "tr": (TrustRegionMinimizer, {"model": "hvp", "cg_max_it": 500}),
    "mlvr": (MLVR, {}),
    "svrg": (MLVR, SVRG),
    "sarah": (MLVR, SARAH),
    "ssn": (MLVR, SSN),
    "lbfgs": (LBFGS, {}),
}


@dataclass(frozen=True)
class LogisticSettings(Settings):
    """The problem, and which optimizer solves it."""

    data: str = setting("generated", "australian, mnist49, generated, or a file in the format of LIBSVM")
    data_dir: str = setting("", "folder of data sets")
    optimizer: str = setting("astrom", "method", choices=tuple(OPTIMIZERS))
    regularization: float = setting(None, "lambda; by default 1 / samples", kind=float, at_least=0)
    rtol: float = setting(1e-8, "tolerance of the gradient's norm, relative to the first", at_least=0)
    seed: int = setting(0, "of the samples that are drawn, and of the generated set", at_least=0)
    samples: int = setting(6000, "of the generated set", at_least=2)
    features: int = setting(5000, "of the generated set", at_least=1)
    decay: float = setting(1.25, "the generated features' principal deviations are as j^-decay", at_least=0)
    noise: float = setting(0.05, "part of the generated labels that are turned round", at_least=0, at_most=0.5)
    summary: str = setting("", "write a summary to this .json file")


def load(settings: LogisticSettings) -> LogisticLoss:
    """The loss of the data set that the settings name."""
    if settings.data == "generated":
        x, y = generate(settings.samples, settings.features, settings.decay, settings.noise, settings.seed)
    elif settings.data == "mnist49":
        data = datasets.load_dataset("mnist", settings.data_dir)
        kept = (data.y_train == 4) | (data.y_train == 9)
        x = data.x_train[kept].flatten(1).double().numpy()
        y = np.where(data.y_train[kept].numpy() == 9, 1.0, -1.0)
    elif settings.data == "australian":
        path = Path(settings.data_dir) / "libsvm" / "australian"
        if not path.exists():
            raise InputError("-data_dir", settings.data_dir or "none", "a folder with libsvm/australian")
        formats.verify_checksum(path, sources.SHA256["libsvm/australian"])
        x, y = formats.read_libsvm(path, 14)
        x = 2.0 * (x - x.min(0)) / np.ptp(x, axis=0) - 1.0  # as LIBSVM's `australian_scale`
    elif Path(settings.data).is_file():
        x, label = formats.read_libsvm(settings.data)
        classes = np.unique(label)
        if len(classes) != 2:
            raise InputError(f"labels of {settings.data}", f"{len(classes)} classes", "two")
        y = np.where(label == classes[1], 1.0, -1.0)
    else:
        raise InputError("-data", settings.data, "australian | mnist49 | generated | a file")
    return LogisticLoss(x, y, settings.regularization)


def generate(samples: int, features: int, decay: float, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Dense samples whose features are correlated, as those of Gisette, and labels of a random plane with noise.

    Principal directions are cosines, the j-th with a deviation as j^-decay; |a|^2 is 100 in the mean.
    """
    rng = np.random.default_rng(seed)
    deviations = np.arange(1.0, features + 1.0) ** -decay
    z = rng.standard_normal((samples, features)) * (10.0 * deviations / np.linalg.norm(deviations))
    y = np.where(z @ rng.standard_normal(features) > 0, 1.0, -1.0)
    y[rng.random(samples) < noise] *= -1.0
    return scipy.fft.idct(z, norm="ortho", axis=1, overwrite_x=True), y


def minimizer(optimizer: str, loss: LogisticLoss, **defaults: Any) -> Minimizer:
    """The optimizer of this name; options win over `defaults`, and those over the optimizer's own."""
    cls, own = OPTIMIZERS[optimizer]
    if optimizer in ("svrg", "sarah"):
        own = own | {"steps": loss.samples}
    return cls(loss, **(own | defaults))


def main(argv: Sequence[str] | None = None) -> float:
    """Minimize from zero; the loss that was reached."""
    with script.command_line(argv, __doc__, (LogisticSettings, "Logistic regression")):
        settings = read(LogisticSettings)
        report.check_targets(MPI.COMM_WORLD, settings)
        loss = load(settings)
        start = torch.zeros(loss.size, dtype=torch.float64)
        first = loss.norm(loss.value_and_gradient(start)[1])
        seeded = {} if settings.optimizer == "lbfgs" else {"seed": settings.seed}
        solver = minimizer(settings.optimizer, loss, gtol=settings.rtol * first, **seeded)
        require_all_read()
        begin = time.perf_counter()
        result = solver.minimize(start)
        seconds = time.perf_counter() - begin
        last, accuracy = result.history[-1], loss.accuracy(result.design)
        PETSc.Sys.Print(
            f"logistic, {settings.data}, {settings.optimizer}: loss {last.objective:.12g}, gradient "
            f"{last.optimality / first:.1e} of the first, accuracy {accuracy:.4f}; {result.message}; "
            f"work {last.work:.1f} ({seconds:.1f} s)"
        )
        if settings.summary:
            found = summary(settings, solver, result, first, accuracy) | {"seconds": seconds}
            text = json.dumps(report._json(found), indent=2) + "\n"
            on_root(MPI.COMM_WORLD, lambda: replace_file(settings.summary, text.encode()))
        return float(last.objective)


def summary(settings: LogisticSettings, solver: Minimizer, result: Result, first: float, accuracy: float) -> Any:
    """What the summary file holds."""
    last = result.history[-1]
    return {
        "problem": "logistic",
        "loss": last.objective,
        "relative_gradient": last.optimality / first,
        "accuracy": accuracy,
        "reason": result.reason.name,
        "iterations": result.iterations,
        "values": last.values,
        "gradients": last.gradients,
        "hessian_products": last.hessian_products,
        "work": last.work,
        "parameters": {**asdict(settings), settings.optimizer: asdict(solver.settings)},
        "history": result.history.as_rows(),
    }


if __name__ == "__main__":
    script.start(main)
