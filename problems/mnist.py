"""Handwritten digits (or other small images) by a convolutional ODE network.

python -m problems.mnist                                                 # scikit-learn's digits
python -m problems.mnist -data_dir DATA
mpiexec -n 2 python -m problems.mnist -data_dir DATA -layers 64
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from problems.shared.command_line import start
from problems.shared.files import DataFiles, choose
from problems.shared.layer_training import LayerTraining


@dataclass(frozen=True)
class ImageSettings(po.Settings):
    """The network and its images."""

    data: str = po.setting(
        "auto",
        "images; auto: mnist with -data_dir or -fetch, else scikit-learn's digits, for 30 epochs unless -epochs says",
        choices=("auto", "digits", "mnist", "fashion_mnist", "cifar10"),
    )
    layers: int = po.setting(8, "layers of the network", at_least=1)
    channels: int = po.setting(8, "channels of a layer", at_least=1)
    Tf: float = po.setting(2.0, "time of the layers", above=0)
    stride: int = po.setting(2, "stride of the opening convolution", at_least=1)
    initial: float = po.setting(0.1, "factor of the layers' first weights", at_least=0)
    activation: str = po.setting("relu", "activation of the layers", choices=tuple(nna.ACTIVATIONS))


class Classifier(nn.Module):
    """Opening convolution, convolutional layers of one shape, closing layer."""

    def __init__(self, settings: ImageSettings, comm: Any, mgrit: nna.MgritSettings, data: nna.Dataset) -> None:
        super().__init__()
        depth, height, width = data.x_train.shape[1:]
        channels, stride, act = settings.channels, settings.stride, settings.activation
        self.opening = nn.Sequential(nn.Conv2d(depth, channels, 3, stride, 1), nna.activation(act))
        self.layers = nna.LayerParallel(comm, lambda: nna.conv(channels, act=act), settings.layers, settings.Tf, mgrit)
        self.layers.scale(settings.initial)
        size = channels * -(-height // stride) * -(-width // stride)
        self.closing = nn.Sequential(nn.Flatten(), nn.Linear(size, data.classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.closing(self.layers(self.opening(x)))  # type: ignore[no-any-return]


def images(own: ImageSettings, files: DataFiles, seed: int) -> nna.Dataset:
    """The images that the settings name."""
    return files.load(_name(own, files), seed)


def _name(own: ImageSettings, files: DataFiles) -> str:
    return choose(own.data, files, "mnist", "digits")


def script(name: str, doc: str | None, data: str = "auto") -> LayerTraining:
    """A script of this network for one set of images."""
    return LayerTraining(
        name,
        doc,
        ImageSettings,
        data=images,
        make=Classifier,
        numbers=lambda own, batch: own.layers * own.channels * (9 * own.channels + batch),
        defaults={
            ImageSettings: {"data": data},
            nna.TrainingSettings: {"epochs": 3, "lr": 4e-3},
            nna.MgritSettings: {"coarsening": "4", "adjoint_cycles": 1},
        },
        passes=lambda own, files: 30 if _name(own, files) == "digits" else 3,
    )


SCRIPT = script("mnist", __doc__)
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the weights run serially."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
