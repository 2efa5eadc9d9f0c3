"""Time: grids of steps, their matrices and inner products, transfers, and all of them solved at once."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
