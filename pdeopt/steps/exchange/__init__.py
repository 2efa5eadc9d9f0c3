"""Messages between the ranks that own steps: how a tensor becomes one, and to whom it goes."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
