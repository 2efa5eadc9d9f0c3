"""The viscosity nu of u_t + u u_x = nu u_xx on (-1, 1) x (0, 1] from noisy measurements of u, and u with it.

The unknown is log nu; neither initial nor boundary values are known.

python -m problems.pinn_inverse_burgers -summary inverse.json
python -m problems.pinn_inverse_burgers -noise 0.05 -measured 500
"""

from __future__ import annotations

from collections.abc import Sequence

from problems.shared import pinn_training
from problems.shared.command_line import start

OPTIONS = pinn_training.options("inverse_burgers")


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the relative error of the result."""
    return pinn_training.main("inverse_burgers", __doc__, argv)


if __name__ == "__main__":
    start(main)
