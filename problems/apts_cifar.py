"""CIFAR-10 by a convolutional network of 62,006 parameters (LeNet-5 for colors), trained by APTS or a rival.

python -m problems.apts_cifar -data_dir DIR -apts_data 4
python -m problems.apts_cifar -data_dir DIR -optimizer adam -lr 1e-3
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

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


SCRIPT = ClassifierScript("apts_cifar", __doc__, lambda data: network(), 40.0, {"data": "cifar10", "samples": 0})
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
