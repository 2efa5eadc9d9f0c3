"""Handwritten digits (or other small images) by a convolutional ODE network.

python -m problems.mnist -epochs 5                                       # scikit-learn's digits
python -m problems.mnist -data mnist -data_dir DATA -epochs 4
mpiexec -n 2 python -m problems.mnist -data mnist -data_dir DATA -layers 64
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nn_adapters.data.dataset import Dataset
from nn_adapters.data.datasets import load_dataset
from nn_adapters.layers.blocks import ACTIVATIONS, activation, conv
from nn_adapters.layers.layerparallel import LayerParallel
from pdeopt.core.settings import Settings, setting
from pdeopt.steps.mgrit import MgritSettings
from problems.shared import layer_training as training
from problems.shared.case import start


@dataclass(frozen=True)
class ImageSettings(Settings):
    """The network and its images."""

    data: str = setting("digits", "data set", choices=("digits", "mnist", "fashion_mnist", "cifar10"))
    layers: int = setting(32, "layers", at_least=1)
    channels: int = setting(8, "channels", at_least=1)
    Tf: float = setting(2.0, "time of the layers", above=0)
    stride: int = setting(2, "of the opening convolution", at_least=1)
    initial: float = setting(0.1, "factor of the layers' first weights", at_least=0)
    activation: str = setting("relu", "activation", choices=tuple(ACTIVATIONS))


class Classifier(nn.Module):
    """Opening convolution, convolutional layers of one shape, closing layer."""

    def __init__(self, data: Dataset, settings: Any, comm: Any, mgrit: MgritSettings) -> None:
        super().__init__()
        depth, height, width = data.x_train.shape[1:]
        channels, stride, act = settings.channels, settings.stride, settings.activation
        self.opening = nn.Sequential(nn.Conv2d(depth, channels, 3, stride, 1), activation(act))
        self.layers = LayerParallel(comm, lambda: conv(channels, act=act), settings.layers, settings.Tf, mgrit)
        self.layers.scale(settings.initial)
        size = channels * -(-height // stride) * -(-width // stride)
        self.closing = nn.Sequential(nn.Flatten(), nn.Linear(size, data.classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.closing(self.layers(self.opening(x)))  # type: ignore[no-any-return]


def main(argv: Sequence[str] | None = None, name: str = "mnist", doc: str = __doc__ or "", **words: Any) -> float:
    """Train; the test accuracy of the weights run serially."""

    def data(own: ImageSettings, output: training.OutputSettings, seed: int) -> Dataset:
        return load_dataset(own.data, output.data_dir, output.fetch, seed)

    def make(settings: ImageSettings, comm: Any, mgrit: MgritSettings, data: Dataset) -> nn.Module:
        return Classifier(data, settings, comm, mgrit)

    mgrit = MgritSettings(coarsening="4", levels=2, cycles=1, adjoint_cycles=1)
    return training.main(name, doc, ImageSettings, data, make, argv, mgrit, **{"epochs": 5, "lr": 2e-3, **words})


if __name__ == "__main__":
    start(main)
