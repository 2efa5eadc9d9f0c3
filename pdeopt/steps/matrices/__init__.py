"""Matrices of single steps as PETSc has them, on one rank or several, and solves with them."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
