"""A network for u_t - 0.001 u_xx - 5 (u - u^3) = 0 on (-1, 1) x (0, 1], u(x, 0) = x^2 cos(pi x), u(+-1, t) = -1.

python -m problems.pinn_allen_cahn -summary allen_cahn.json
python -m problems.pinn_allen_cahn -resample_every 500 -plot allen_cahn.png
"""

from __future__ import annotations

from collections.abc import Sequence

from problems.shared import pinn_training
from problems.shared.command_line import start

OPTIONS = pinn_training.options("allen_cahn")


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the relative error of the result."""
    return pinn_training.main("allen_cahn", __doc__, argv)


if __name__ == "__main__":
    start(main)
