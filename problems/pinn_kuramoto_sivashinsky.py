"""A network for Kuramoto and Sivashinsky's equation, of period 2 in x, t in (0, 1], u(x, 0) = -sin(pi x).

u_t + (5/pi) u u_x + (5/3)/pi^2 u_xx + (5/27)/pi^4 u_xxxx = 0: in y = 3 pi x, s = 15 t it is u_s + u u_y + u_yy +
u_yyyy = 0.

python -m problems.pinn_kuramoto_sivashinsky -summary kuramoto_sivashinsky.json
"""

from __future__ import annotations

from collections.abc import Sequence

from problems.shared import pinn_training
from problems.shared.command_line import start

OPTIONS = pinn_training.options("kuramoto_sivashinsky")


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the relative error of the result."""
    return pinn_training.main("kuramoto_sivashinsky", __doc__, argv)


if __name__ == "__main__":
    start(main)
