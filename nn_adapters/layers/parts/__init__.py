"""What parallel layers are made of: what surrounds a solve, stacked parameters, norms and dropout, compiled loops."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
