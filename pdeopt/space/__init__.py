"""The space of one step: weak forms in UFL as its residual and its objective, by DOLFINx."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
