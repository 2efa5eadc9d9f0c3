"""Networks trained as the control problems that they are."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
