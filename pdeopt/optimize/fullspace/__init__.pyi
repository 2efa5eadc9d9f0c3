from pdeopt.optimize.fullspace.activeset import ActiveSetKKT as ActiveSetKKT
from pdeopt.optimize.fullspace.composite import CompositeSettings as CompositeSettings, CompositeStep as CompositeStep
from pdeopt.optimize.fullspace.interior import (
    InequalityMethod as InequalityMethod,
    InequalityResult as InequalityResult,
    InteriorPoint as InteriorPoint,
    InteriorSettings as InteriorSettings,
)
from pdeopt.optimize.fullspace.kktchoice import KKTSettings as KKTSettings
from pdeopt.optimize.fullspace.kktsolver import KKTSolver as KKTSolver
from pdeopt.optimize.fullspace.method import FullSpaceMethod as FullSpaceMethod, full_space_test as full_space_test
from pdeopt.optimize.fullspace.handover import NewtonThenComposite as NewtonThenComposite
from pdeopt.optimize.fullspace.moreauyosida import (
    MoreauYosida as MoreauYosida,
    MoreauYosidaSettings as MoreauYosidaSettings,
)
from pdeopt.optimize.fullspace.newton import NewtonKKT as NewtonKKT
from pdeopt.optimize.fullspace.sqp import (
    ON_PATHS as ON_PATHS,
    SQPSettings as SQPSettings,
    SQPSolver as SQPSolver,
    said as said,
)

__all__: list[str]
