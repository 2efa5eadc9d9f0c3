"""Curvature of networks: Kronecker factors of layers, products with the Fisher matrix, and optimizers."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
