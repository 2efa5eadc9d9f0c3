"""The optimality system of a control problem: layout, matrices, operators, blocks of the steps."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
