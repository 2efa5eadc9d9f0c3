"""A network for -0.01 (u_xx + u_yy) + u_x + u_y = 1 on the unit square, u = 0 on its boundary.

python -m problems.pinn_diffusion_transport -summary diffusion_transport.json
python -m problems.pinn_diffusion_transport -optimizer lbfgs -lbfgs_memory 100
"""

from __future__ import annotations

from collections.abc import Sequence

from problems.shared import pinn_training
from problems.shared.command_line import start

OPTIONS = pinn_training.options("diffusion_transport")


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the relative error of the result."""
    return pinn_training.main("diffusion_transport", __doc__, argv)


if __name__ == "__main__":
    start(main)
