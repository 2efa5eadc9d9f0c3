"""pdeopt: optimization under transient constraints, on PETSc."""

__version__ = "0.1.0"
