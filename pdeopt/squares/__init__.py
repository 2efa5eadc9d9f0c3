"""Sums of squares: residuals with their Jacobians, and running sums of products over samples and ranks."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
