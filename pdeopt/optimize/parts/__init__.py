"""Parts of optimizers: how far, which radius, which model, and the one iteration loop."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
