"""pdeopt: optimization under transient constraints, on PETSc.

`import pdeopt as po` offers what a program needs: constraint, objectives, time grid and problem; solvers and what they
return; smooth functions; options; checks. A name is loaded when it is first asked for, so that
`petsc4py.init(sys.argv)` may still come before. Each room of the library has a door of its own (`pdeopt.steps`, ...).
"""

from pdeopt.core.lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(__name__, __file__)
