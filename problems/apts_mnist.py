"""MNIST by a fully connected network of 26,506 parameters, trained by APTS or a rival.

python -m problems.apts_mnist -data_dir DIR -apts_data 4
mpiexec -n 2 python -m problems.apts_mnist -data_dir DIR -apts_weights 2 -apts_data 2 -summary mnist.json
torchrun --nproc-per-node 2 --no-python python -m problems.apts_mnist -data_dir DIR -backend gloo -apts_data 2
python -m problems.apts_mnist -data_dir DIR -optimizer sgd -lr 0.03
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from nn_adapters.data.dataset import Dataset
from problems.shared import image_classifiers as apts
from problems.shared.case import start


def network(pixels: int = 784, classes: int = 10) -> nn.Sequential:
    """Two hidden layers of 32."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, classes)
    )


def of(data: Dataset) -> nn.Sequential:
    """The network for these images."""
    return network(data.x_train[0].numel(), data.classes)


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy."""
    return apts.main("apts_mnist", __doc__, of, argv, max_work=30.0)


if __name__ == "__main__":
    start(main)
