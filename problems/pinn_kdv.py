"""A network for u_t + u u_x + 0.0025 u_xxx = 0, of period 2 in x, t in (0, 1], u(x, 0) = cos(pi x): Korteweg-de Vries.

python -m problems.pinn_kdv -summary kdv.json
"""

from __future__ import annotations

from collections.abc import Sequence

from problems.shared import pinn_training
from problems.shared.command_line import start

OPTIONS = pinn_training.options("kdv")


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the relative error of the result."""
    return pinn_training.main("kdv", __doc__, argv)


if __name__ == "__main__":
    start(main)
