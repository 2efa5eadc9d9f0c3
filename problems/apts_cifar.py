"""CIFAR-10 by a convolutional network of 62,006 parameters (LeNet-5 for colors), trained by APTS or a rival.

python -m problems.apts_cifar -data_dir DIR
python -m problems.apts_cifar -data_dir DIR -optimizer adam -lr 1e-3
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

import nn_adapters as nna
import pdeopt as po
from problems.shared.command_line import start
from problems.shared.image_classifiers import ClassifierScript


def network() -> nn.Sequential:
    """Two convolutions of 5 x 5 with pooling, and three full layers."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def for_images(data: nna.Dataset) -> nn.Sequential:
    """The network for these images; raises `InputError` for images of another size."""
    if data.x_train.shape[1:] != (3, 32, 32) or data.classes != 10:
        got = f"{data.name} with samples {tuple(data.x_train.shape[1:])} and {data.classes} classes"
        raise po.InputError("-data", got, "images (3, 32, 32) of 10 classes, as cifar10")
    return network()


SCRIPT = ClassifierScript("apts_cifar", __doc__, for_images, 20.0, {"data": "cifar10", "samples": 0}, {"data": 4})
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
