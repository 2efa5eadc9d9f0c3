"""Logistic regression with a quadratic regularizer, by methods that sample, and by methods that do not.

    python -m problems.logistic -data australian -data_dir DATA -optimizer astrom
    python -m problems.logistic -data mnist49 -data_dir DATA -optimizer mlvr -summary mnist49.json
    python -m problems.logistic -data generated -optimizer tr
    python -m problems.logistic -data FILE            # in the format of LIBSVM, with two labels

`svrg`, `sarah` and `ssn` are settings of MLVR; their defaults are those, and `-mlvr_*` change them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.fft
import scipy.sparse
import torch
from mpi4py import MPI
from petsc4py import PETSc

import nn_adapters as nna
import pdeopt as po
from nn_adapters.data import Source, read_libsvm, scaled_to_one
from nn_adapters.data.limits import regular_file
from pdeopt.core import digest, interruptible, require_memory, sections
from pdeopt.core.memory import DOUBLE
from pdeopt.functions import Tally
from pdeopt.optimize.descent import Minimizer
from problems.shared import pictures
from problems.shared.checkpoints import DescentCheckpoints, method_fingerprint
from problems.shared.command_line import command_line, finish, start
from problems.shared.files import CheckpointFiles, DataFiles, ReportFiles, check_targets, choose, write_report
from problems.shared.optimizers import Optimizers

#: Iterations from checkpoint to checkpoint.
EVERY = 10

#: Settings of MLVR that are other methods.
SVRG = {
    "levels": 2,
    "coarse": "gradient",
    "redraw": "step",
    "batch": 1,
    "steps": 0,
    "memory": 0,
    "nested": 0,
    "sampling": "uniform",
}
SARAH = SVRG | {"reference": "previous"}
SSN = {"levels": 2, "coarse": "newton", "redraw": "cycle", "memory": 0, "nested": 0, "sampling": "uniform"}

#: Optimizers by name, with defaults that differ from their own.
OPTIMIZERS = Optimizers(
    {
        "astrom": (po.ASTROM, {}),
        "tr": (po.TrustRegionMinimizer, {"model": "hvp", "cg_max_it": 500}),
        "mlvr": (po.MLVR, {}),
        "svrg": (po.MLVR, SVRG),
        "sarah": (po.MLVR, SARAH),
        "ssn": (po.MLVR, SSN),
        "lbfgs": (po.LBFGS, {}),
    },
    stop={"gtol": None},  # by -rtol
)


@dataclass(frozen=True)
class LogisticSettings(po.Settings):
    """Logistic regression: the problem, and which optimizer solves it."""

    data: str = po.setting(
        "auto",
        "australian, mnist49, generated, or a file in the format of LIBSVM; auto: australian with -data_dir or -fetch, "
        "else generated",
    )
    optimizer: str = po.setting("astrom", "optimizer", choices=tuple(OPTIMIZERS))
    regularization: float = po.setting(
        None, "factor of the quadratic regularizer; by default 1 / samples", kind=float, at_least=0
    )
    rtol: float = po.setting(
        1e-8, "tolerance of the gradient's norm, relative to the first; -opt_gtol, which is absolute, wins", at_least=0
    )
    seed: int = po.setting(0, "seed of the samples that are drawn, and of the generated set", at_least=0)
    samples: int = po.setting(6000, "samples of the generated set", at_least=2)
    features: int = po.setting(5000, "features of the generated set", at_least=1)
    decay: float = po.setting(1.25, "the generated features' principal deviations are as j^-decay", at_least=0)
    noise: float = po.setting(0.05, "part of the generated labels that are turned round", at_least=0, at_most=0.5)


def load(settings: LogisticSettings, files: DataFiles) -> nna.LogisticLoss:
    """The loss of the data set that the settings name."""
    name = choose(settings.data, files, "australian", "generated")
    if name == "generated":
        sizes = f"{settings.samples}, {settings.features}"
        require_memory(2 * DOUBLE * settings.samples * settings.features, "-samples, -features", sizes, "smaller ones")
        x, y = generate(settings.samples, settings.features, settings.decay, settings.noise, settings.seed)
    elif name == "mnist49":
        data = files.load("mnist")
        kept = (data.y_train == 4) | (data.y_train == 9)
        x = data.x_train[kept].flatten(1).double().numpy()
        y = np.where(data.y_train[kept].numpy() == 9, 1.0, -1.0)
    elif name == "australian":
        source = Source(name, files.data_dir, files.fetch, files.data_limit)
        x, y = read_libsvm(source.path("libsvm/australian"), 14)
        x = scaled_to_one(x.toarray())  # as LIBSVM's `australian_scale`
    elif regular_file(name):
        x, y = read_two_classes(name)
    else:
        raise po.InputError("-data", name, "auto | australian | mnist49 | generated | a file")
    return nna.LogisticLoss(x, y, settings.regularization)


def read_two_classes(path: str) -> tuple[Any, np.ndarray]:
    """Samples and labels -1 or 1, the larger one, from a file in the format of LIBSVM.

    Features that no sample has are left out: their weights are 0. The table is sparse where that takes less memory.

    Raises:
        InputError: a file of another format, or with more or fewer than two labels.
    """
    x, label = read_libsvm(path)
    classes = np.unique(label)
    if len(classes) != 2:
        raise po.InputError(f"labels of {path}", f"{len(classes)} classes", "two")
    used, columns = np.unique(x.indices, return_inverse=True)
    x = scipy.sparse.csr_matrix((x.data, columns, x.indptr), (x.shape[0], len(used)))
    dense = x.shape[0] * x.shape[1] <= 2 * x.nnz
    return (x.toarray() if dense else x), np.where(label == classes[1], 1.0, -1.0)


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


def minimizer(optimizer: str, loss: nna.LogisticLoss, **defaults: Any) -> Minimizer:
    """The optimizer of this name; options win over `defaults`, and those over the optimizer's own."""
    return OPTIMIZERS.make(optimizer, loss, **defaults)


OPTIONS = [
    *sections(LogisticSettings),
    *OPTIMIZERS.options(LogisticSettings().optimizer),
    *sections(DataFiles),
    *sections(ReportFiles),
    *sections(CheckpointFiles, checkpoint_every=EVERY),
]


def main(argv: Sequence[str] | None = None) -> float:
    """Minimize from zero; the loss that was reached."""
    with command_line(argv, __doc__, OPTIONS):
        settings, files, report = po.read(LogisticSettings), po.read(DataFiles), po.read(ReportFiles)
        kept = po.read(CheckpointFiles, checkpoint_every=EVERY)
        check_targets(MPI.COMM_WORLD, report, kept)
        loss = load(settings, files)
        x = torch.zeros(loss.size, dtype=torch.float64)
        first = loss.norm(loss.value_and_gradient(x)[1])
        solver = minimizer(settings.optimizer, loss, gtol=settings.rtol * first, seed=settings.seed)
        po.require_all_read()
        begin = time.perf_counter()
        checkpoints = DescentCheckpoints(kept, MPI.COMM_WORLD, fingerprint(settings, loss, solver), loss.memory)
        loss.tally.set(Tally())
        with interruptible():
            going_on = checkpoints.resume()
            if checkpoints.run_before:
                loss.recall(checkpoints.run_before)
            result = solver.minimize(x, observers=[checkpoints.observe], **going_on)
        checkpoints.end("logistic", result)
        seconds = time.perf_counter() - begin
        last, accuracy = result.history[-1], loss.accuracy(result.design)
        data = choose(settings.data, files, "australian", "generated")
        PETSc.Sys.Print(
            f"logistic, {data}, {settings.optimizer}: loss {last.objective:.12g}, gradient "
            f"{last.optimality / first:.1e} of the first, accuracy {accuracy:.4f}; {result.message}; "
            f"work {last.work:.1f} ({seconds:.1f} s)"
        )
        found = summary(settings, solver, result, first, accuracy) | {"seconds": seconds}
        write_report(MPI.COMM_WORLD, report, found, lambda: _picture(f"{data}, {settings.optimizer}", result, first))
        checkpoints.leave()
        finish("logistic", result.reason > 0, result.message)
        return float(last.objective)


def fingerprint(settings: LogisticSettings, loss: nna.LogisticLoss, solver: Minimizer) -> dict[str, Any]:
    """What must be equal where a run goes on."""
    rows = loss.rows
    parts = [rows] if isinstance(rows, np.ndarray) else [rows.data, rows.indices, rows.indptr]
    data = digest(*map(torch.from_numpy, parts), loss.labels)
    own = {"optimizer": settings.optimizer, "regularization": loss.regularization, "data": data}
    return {"problem": "logistic", **own, **method_fingerprint(solver)}


def summary(settings: LogisticSettings, solver: Minimizer, result: po.Result, first: float, accuracy: float) -> Any:
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


def _picture(title: str, result: po.Result, first: float) -> Any:
    """Loss above the least one and gradient over the work."""
    history = result.history
    work, loss = np.array(history["work"]), np.array(history["objective"])
    figure = pictures.new_figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    left.semilogy(work[:-1], loss[:-1] - loss.min(), ".-", nonpositive="mask")
    left.set(title="loss - least loss of the run", xlabel="work in full gradients")
    right.semilogy(work, np.array(history["optimality"]) / first, ".-", nonpositive="mask")
    right.set(title="norm of the gradient, relative to the first", xlabel="work in full gradients")
    for axis in (left, right):
        axis.grid(True, alpha=0.3)
    figure.suptitle(f"logistic regression, {title}")
    return figure


if __name__ == "__main__":
    start(main)
