"""A network for u_t = (0.01 (u^3 - u) - 1e-5 u_xx)_xx, of period 2 in x, t in (0, 1], u(x, 0) = -cos(2 pi x).

Cahn and Hilliard's equation: two phases part where u is near 0.

python -m problems.pinn_cahn_hilliard -summary cahn_hilliard.json
"""

from __future__ import annotations

from collections.abc import Sequence

from problems.shared import pinn_training
from problems.shared.command_line import start

OPTIONS = pinn_training.options("cahn_hilliard")


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the relative error of the result."""
    return pinn_training.main("cahn_hilliard", __doc__, argv)


if __name__ == "__main__":
    start(main)
