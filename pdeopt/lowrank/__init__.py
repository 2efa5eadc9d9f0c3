"""Matrices of low rank in disguise: kernels and factors of curvature, each a PETSc Mat or PC."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
