"""A network for u_tt - u_xx + u^2 = -x cos t + x^2 cos^2 t on (-1, 1) x (0, 12], with the solution x cos t.

python -m problems.pinn_klein_gordon -summary klein_gordon.json
python -m problems.pinn_klein_gordon -optimizer spqn -spqn_type multiplicative
"""

from __future__ import annotations

from collections.abc import Sequence

from problems.shared import pinn_training
from problems.shared.command_line import start

OPTIONS = pinn_training.options("klein_gordon")


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the relative error of the result."""
    return pinn_training.main("klein_gordon", __doc__, argv)


if __name__ == "__main__":
    start(main)
