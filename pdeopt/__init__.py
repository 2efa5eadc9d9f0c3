"""pdeopt: optimization under transient constraints, on PETSc.

`import pdeopt as po` offers what a program needs: constraint, objectives, time grid and problem; solvers and what they
return; smooth functions; options; checks. A name is loaded when it is first asked for, so that
`petsc4py.init(sys.argv)` may still come before; if it comes later, its options count from then on. Each room of the
library has a door of its own (`pdeopt.steps`, ...).

Under mpiexec with more than one rank, the import arranges that a rank that ends with an error ends all of them; see
`pdeopt.core.ranks`.
"""

from pdeopt.core.lazy import attach, heed_late_init
from pdeopt.core.ranks import watch_if_launched

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(__name__, __file__)

watch_if_launched()
heed_late_init()
