"""A trained classifier of images made smaller, to a tolerance on its accuracy; attacks on it before and after.

python -m problems.compress                                              # scikit-learn's digits
python -m problems.compress -data_dir DATA -widths 500,500 -plot compress.png
python -m problems.compress -data_dir DATA -network cnn -tune_steps 300 -tune_lr 3e-4
python -m problems.compress -data_dir DATA -checkpoint net.ck            # train, and keep the network
python -m problems.compress -data_dir DATA -restart net.ck -tolerance 0.01 -how low_rank+quantization
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from pdeopt.core import interruptible, on_root, sections
from problems.kfac_mnist import ClassifierKind, task
from problems.shared import pictures
from problems.shared.command_line import command_line, finish, start
from problems.shared.curvature_training import FitRun, prepared
from problems.shared.files import CheckpointFiles, DataFiles, ReportFiles, check_targets, choose, write_report
from problems.shared.fit_steps import Fit, FitSettings, FitSteps, hidden_widths

#: What is done one after the other; each of the stages may take its share of the tolerance.
WAYS = {
    "low_rank": ("low_rank",),
    "pruning": ("pruning",),
    "quantization": ("quantization",),
    "low_rank+quantization": ("low_rank", "quantization"),
    "pruning+quantization": ("pruning", "quantization"),
}

#: Settings of the training that differ from those of K-FAC's scripts.
TRAINING = {
    "optimizer": "adam",
    "lr": 1e-3,
    "batch": 100,
    "samples": 0,
    "pool": False,
    "activation": "relu",
    "max_steps": 2000,
    "check_every": 1000,
}


@dataclass(frozen=True)
class CompressSettings(po.Settings):
    """Compression, and the attacks."""

    how: str = po.setting("all", "what is done", choices=("all", *WAYS))
    tolerance: float = po.setting(0.005, "accuracy on the validation samples that may be lost", at_least=0, at_most=1)
    validation: float = po.setting(0.1, "share of the training samples that the tolerance is for", above=0, at_most=0.5)
    moments: int = po.setting(
        2000, "training samples whose features weight the errors of layers; 0: all inputs count alike", at_least=0
    )
    split: str = po.setting("best", "of convolutions of low rank", choices=("channels", "space", "best"))
    tune_steps: int = po.setting(0, "steps of training after low rank and pruning", at_least=0)
    tune_lr: float = po.setting(3e-4, "learning rate of these, by Adam", above=0, at_most=1e30)
    sizes: str = po.setting("0.02,0.05,0.1", "largest moves of a pixel by the attacks, which is in 0..1")
    attacked: int = po.setting(2000, "test samples that are attacked, at most", at_least=1)


OPTIONS = [
    *sections(FitSettings, **TRAINING),
    *sections(ClassifierKind),
    *sections(CompressSettings),
    *sections(DataFiles),
    *sections(ReportFiles),
    *sections(CheckpointFiles, checkpoint_every=1000),
]


def main(argv: Sequence[str] | None = None) -> float:
    """Train or restart, compress, attack; the test accuracy of the last smaller network. Collective."""
    comm = MPI.COMM_WORLD
    with command_line(argv, __doc__, OPTIONS):
        training, own, files = po.read(FitSettings, **TRAINING), po.read(CompressSettings), po.read(DataFiles)
        report, kept = po.read(ReportFiles), po.read(CheckpointFiles, checkpoint_every=1000)
        sizes = attack_sizes(own.sizes)
        torch.manual_seed(training.seed)
        hidden_widths(training.widths, (1,))
        name = choose(training.data, files, "mnist", "digits")
        data = on_root(comm, lambda: files.load(name, training.seed))
        fit, validation = _split(task(training, prepared(data, training)), own.validation)
        steps = FitSteps(fit, training, comm)
        po.require_all_read()
        check_targets(comm, report, kept)
        if kept.checkpoint and comm.size > 1:
            raise po.InputError("-checkpoint", f"{comm.size} ranks", "1 rank")
        run = FitRun("compress", training, steps, kept, comm)
        with interruptible():
            found = run.train()
        run.file.leave()
        study = Study(fit, validation, training, own, sizes)
        rows = [study.row("as it was", fit.network, {}, 0.0)]
        _print(comm, rows[0])
        for way in WAYS if own.how == "all" else (own.how,):
            rows.append(study.compressed(way))
            _print(comm, rows[-1])
        problem = {"name": "compress", **asdict(training), **asdict(own), "data": name}
        write_report(comm, report, found | {"problem": problem, "networks": rows}, lambda: _picture(rows, name))
        missed = training.target_loss is not None and not found["reached"]
        finish("compress", not missed, f"loss {found['train_loss']:.4g}: more -max_steps, or a larger -target_loss")
        return float(rows[-1]["test_accuracy"])


def attack_sizes(text: str) -> list[float]:
    """The numbers in `0.02,0.05`."""
    try:
        sizes = [float(word) for word in text.split(",")]
    except ValueError:
        sizes = [math.nan]
    if not all(math.isfinite(size) and size >= 0.0 for size in sizes):
        raise po.InputError("-sizes", text, "numbers >= 0 with commas between them, as 0.02,0.05")
    return sizes


def _split(fit: Fit, share: float) -> tuple[Fit, tuple[Tensor, Tensor]]:
    """The last of the training samples are for validation."""
    first = len(fit.x) - max(1, round(share * len(fit.x)))
    if not first:
        raise po.InputError("-samples", len(fit.x), "at least 2")
    return replace(fit, x=fit.x[:first], y=fit.y[:first]), (fit.x[first:], fit.y[first:])


@dataclass(frozen=True)
class Study:
    """Smaller versions of one network, and what is asked of each.

    Attributes:
        fit: the trained network with its samples.
        validation: samples and classes that the tolerance is for.
        training, own: settings.
        sizes: of the attacks.
    """

    fit: Fit
    validation: tuple[Tensor, Tensor]
    training: FitSettings
    own: CompressSettings
    sizes: list[float]

    def compressed(self, way: str) -> dict[str, Any]:
        """Compress in one way; the row of the table."""
        begin, network, levels = time.process_time(), self.fit.network, dict[str, str]()
        before, stages = nna.accuracy(network, *self.validation), WAYS[way]
        for number, stage in enumerate(stages, 1):
            least = before - self.own.tolerance * number / len(stages)
            tolerance = max(nna.accuracy(network, *self.validation) - least, 0.0)
            tune = self._tune if self.own.tune_steps and stage != "quantization" else None
            found = nna.compress(network, self._how(stage), self._accuracy, tolerance, self._moments, tune)
            network = found.network
            levels |= {f"{stage} {name}": level.name for name, level in found.levels.items()}
        return self.row(way, network, levels, time.process_time() - begin)

    def row(self, way: str, network: nn.Module, levels: dict[str, str], seconds: float) -> dict[str, Any]:
        """What a network takes, and how it does; attacks are made for it, or for the network as it was."""
        x, y = (each[: self.own.attacked] for each in (self.fit.x_test, self.fit.y_test))
        low, high = (float(f(self.fit.x)) for f in (torch.min, torch.max))

        def under_attack(attacked: nn.Module) -> list[float]:
            moved = (nna.fgsm(attacked, x, y, size, (low, high)) for size in self.sizes)
            return [nna.accuracy(network, each, y) for each in moved]

        return {
            "how": way,
            "bytes": nna.stored_bytes(network),
            "ratio": nna.stored_bytes(self.fit.network) / nna.stored_bytes(network),
            "multiplications": nna.multiplications(network, x),
            "validation_accuracy": nna.accuracy(network, *self.validation),
            "test_accuracy": nna.accuracy(network, self.fit.x_test, self.fit.y_test),
            "sizes": self.sizes,
            "attacked_accuracy": under_attack(network),
            "transferred_accuracy": under_attack(self.fit.network),
            "levels": levels,
            "cpu_seconds": seconds,
        }

    @property
    def _moments(self) -> Tensor | None:
        return self.fit.x[: self.own.moments] if self.own.moments else None

    def _how(self, stage: str) -> Any:
        """The compression of one stage."""
        if stage == "low_rank":
            return nna.LowRankLayers(split=self.own.split)
        return nna.Pruning() if stage == "pruning" else nna.Quantization()

    def _accuracy(self, network: nn.Module) -> float:
        return nna.accuracy(network, *self.validation)

    def _tune(self, network: nn.Module) -> None:
        """Train a smaller network on; each rank does all of it."""
        settings = replace(self.training, optimizer="adam", lr=self.own.tune_lr)
        steps = FitSteps(replace(self.fit, network=network), settings, MPI.COMM_SELF)
        for _ in range(self.own.tune_steps):
            steps.step()


def _print(comm: Any, row: dict[str, Any]) -> None:
    if comm.rank == 0:
        attacks = ", ".join(f"{100 * a:.2f}" for a in row["attacked_accuracy"])
        print(
            f"compress, {row['how']:22s} {row['bytes'] / 1e3:8.1f} kB ({row['ratio']:5.1f}x), "
            f"{row['multiplications'] / 1e3:8.0f} k multiplications, test {100 * row['test_accuracy']:.2f} %, "
            f"attacked {attacks} % ({row['cpu_seconds']:.1f} CPU s)",
            flush=True,
        )


def _picture(rows: list[dict[str, Any]], data: str) -> Any:
    """Accuracy over bytes, and over the size of attacks."""
    figure = pictures.new_figure(9.5, 4.0)
    left, right = figure.subplots(1, 2)
    for row in rows:
        left.semilogx(row["bytes"] / 1e3, 100 * row["test_accuracy"], "o", label=row["how"])
        attacks: Sequence[tuple[float, float]] = [
            (0.0, row["test_accuracy"]),
            *zip(row["sizes"], row["attacked_accuracy"]),
        ]
        right.plot([size for size, _ in attacks], [100 * each for _, each in attacks], "o-", label=row["how"])
    left.set(title="without an attack", xlabel="kB", ylabel="test accuracy, %")
    right.set(title="fast gradient sign", xlabel="largest move of a pixel", ylabel="test accuracy, %")
    right.legend(fontsize="small")
    for axis in (left, right):
        axis.grid(True, alpha=0.3)
    figure.suptitle(f"compress, {data}")
    return figure


if __name__ == "__main__":
    start(main)
