"""Smooth functions without time: counted calls, parts, coarser levels, samples."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
