"""What parallel layers are made of: steps, what surrounds a solve, stacked parameters, norms, dropout, loops."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
