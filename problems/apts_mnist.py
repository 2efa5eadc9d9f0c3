"""MNIST by a fully connected network of 26,506 parameters, trained by APTS or a rival.

python -m problems.apts_mnist                                 # the digits that come with scikit-learn
python -m problems.apts_mnist -data_dir DIR -apts_data 4
mpiexec -n 2 python -m problems.apts_mnist -data_dir DIR -apts_weights 2 -apts_data 2 -summary mnist.json
torchrun --nproc-per-node 2 --no-python python -m problems.apts_mnist -data_dir DIR -backend gloo -apts_data 2
python -m problems.apts_mnist -data_dir DIR -optimizer sgd -lr 0.03
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

import nn_adapters as nna
from problems.shared.command_line import start
from problems.shared.image_classifiers import ClassifierScript


def network(pixels: int = 784, classes: int = 10) -> nn.Sequential:
    """Two hidden layers of 32."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, classes)
    )


def of(data: nna.Dataset) -> nn.Sequential:
    """The network for these images."""
    return network(data.x_train[0].numel(), data.classes)


SCRIPT = ClassifierScript("apts_mnist", __doc__, of, 30.0, {})
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
