"""What parallel layers are made of: what surrounds a solve, and compiled loops through dense layers."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
