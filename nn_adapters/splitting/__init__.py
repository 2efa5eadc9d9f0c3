"""Training by splitting: proximal maps, the layers of a network in split form, and their constraint."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
