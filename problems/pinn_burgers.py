"""A network for u_t + u u_x = nu u_xx on (-1, 1) x (0, 1], nu = 0.01 / pi, u(x, 0) = -sin(pi x), u(+-1, t) = 0.

python -m problems.pinn_burgers -summary burgers.json
python -m problems.pinn_burgers -layers 4 -body mlp -adaptive false
"""

from __future__ import annotations

from collections.abc import Sequence

from problems.shared import pinn_training
from problems.shared.command_line import start

OPTIONS = pinn_training.options("burgers")


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the relative error of the result."""
    return pinn_training.main("burgers", __doc__, argv)


if __name__ == "__main__":
    start(main)
