"""The control problem: what a user writes, lifted to PETSc vectors, and its reduced objective."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
