"""Digits (or other small images) by a dense or a convolutional network, trained by K-FAC or a rival.

python -m problems.kfac_mnist                                            # scikit-learn's digits
python -m problems.kfac_mnist -data_dir DATA -batch 8192 -target_loss 0.05
python -m problems.kfac_mnist -data_dir DATA -optimizer sgd -lr 0.3 -target_loss 0.05 -max_steps 2000
python -m problems.kfac_mnist -data cifar10 -data_dir DATA -network cnn -standardize -activation relu -batch 100
mpiexec -n 2 python -m problems.kfac_mnist -data_dir DATA -batch 8192 -target_loss 0.05
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from pdeopt.core import require_memory
from problems.shared.command_line import start
from problems.shared.curvature_training import CurvatureScript, dense_network
from problems.shared.fit_steps import Fit, FitSettings, hidden_widths


@dataclass(frozen=True)
class ClassifierKind(po.Settings):
    """The kind of network, and of its inputs."""

    network: str = po.setting("mlp", "dense layers, or convolutions and a dense layer", choices=("mlp", "cnn"))
    standardize: bool = po.setting(False, "channels of mean 0 and deviation 1 over the training samples")


def convolutions(depth: int, height: int, width: int, channels: Sequence[int], act: str, classes: int) -> nn.Sequential:
    """Convolutions of 3x3, each followed by an activation and means of 2x2 while they fit, and a dense layer."""
    parts: list[nn.Module] = []
    for number in channels:
        require_memory(32 * 9 * depth * number, "-widths", number, "fewer channels")
        parts += [nn.Conv2d(depth, number, 3, padding=1), nna.activation(act)]
        depth = number
        if min(height, width) >= 4:
            parts.append(nn.AvgPool2d(2))
            height, width = height // 2, width // 2
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(depth * height * width, classes))


def task(own: FitSettings, data: nna.Dataset) -> Fit:
    """Cross-entropy of the classes."""
    shape, act, kind = data.x_train.shape[1:], own.activation, po.read(ClassifierKind)
    x, x_test = _standardized(data.x_train, data.x_test) if kind.standardize else (data.x_train, data.x_test)
    if kind.network == "cnn":
        depth, height, width = shape
        network = convolutions(depth, height, width, hidden_widths(own.widths, (16, 32)), act, data.classes)
    else:
        network = dense_network([shape.numel(), *hidden_widths(own.widths, (100, 100)), data.classes], act)
    network.to(data.x_train.dtype)
    return Fit(network, nna.CrossEntropy(), x, data.y_train, x_test, data.y_test, True)


def _standardized(x: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    """Both by the channels' means and deviations over the training samples."""
    axes = (0, *range(2, x.dim()))
    mean, deviation = x.mean(axes, keepdim=True), x.std(axes, keepdim=True).clamp_min(1e-12)
    return (x - mean) / deviation, (x_test - mean) / deviation


DEFAULTS = {"averaging": 16.0, "rival": "sgd", "rival_lr": 0.3}
SCRIPT = CurvatureScript("kfac_mnist", __doc__, task, (ClassifierKind,), DEFAULTS)
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the loss of all training samples."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
