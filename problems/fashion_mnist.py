"""Pieces of clothing by the convolutional ODE network of problems/mnist.py.

python -m problems.fashion_mnist -data_dir DATA
"""

from __future__ import annotations

from collections.abc import Sequence

from problems import mnist
from problems.shared.command_line import start

SCRIPT = mnist.script("fashion_mnist", __doc__, "fashion_mnist")
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the weights run serially."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
