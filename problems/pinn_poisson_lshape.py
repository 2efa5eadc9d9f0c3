"""A network for -u_xx - u_yy = 1 on (-1, 1)^2 without [0, 1)^2, u = 0 on the boundary: a corner with a singularity.

python -m problems.pinn_poisson_lshape -summary lshape.json
"""

from __future__ import annotations

from collections.abc import Sequence

from problems.shared import pinn_training
from problems.shared.command_line import start

OPTIONS = pinn_training.options("poisson_lshape")


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the relative error of the result."""
    return pinn_training.main("poisson_lshape", __doc__, argv)


if __name__ == "__main__":
    start(main)
