"""A network of two fields for i h_t + h_xx / 2 + |h|^2 h = 0, of period 10 in x, t in (0, pi/2], h(x, 0) = 2 / cosh x.

python -m problems.pinn_schroedinger -summary schroedinger.json
"""

from __future__ import annotations

from collections.abc import Sequence

from problems.shared import pinn_training
from problems.shared.command_line import start

OPTIONS = pinn_training.options("schroedinger")


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the relative error of the result."""
    return pinn_training.main("schroedinger", __doc__, argv)


if __name__ == "__main__":
    start(main)
