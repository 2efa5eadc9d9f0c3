"""Trained networks made smaller, to a tolerance on their accuracy, and attacks that ask what that has cost."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
