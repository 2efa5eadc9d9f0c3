from pdeopt.optimize.squares.damping import (
    LINEAR_SOLVERS as LINEAR_SOLVERS,
    DampedSystem as DampedSystem,
    Normal as Normal,
    Products as Products,
    Singular as Singular,
    Woodbury as Woodbury,
    chosen as chosen,
)
from pdeopt.optimize.squares.linearized import Linearized as Linearized
from pdeopt.optimize.squares.redrawing import Redrawing as Redrawing, RedrawSettings as RedrawSettings
from pdeopt.optimize.squares.dampedsteps import (
    DampedSteps as DampedSteps,
    LevenbergSettings as LevenbergSettings,
    Trial as Trial,
)
from pdeopt.optimize.squares.dampingsearch import DampingSearch as DampingSearch
from pdeopt.optimize.squares.levenberg import LevenbergMarquardt as LevenbergMarquardt
from pdeopt.optimize.squares.gaussnewton import (
    DampedCurvature as DampedCurvature,
    GaussNewton as GaussNewton,
    GaussNewtonSettings as GaussNewtonSettings,
)
from pdeopt.optimize.squares.reducedsquares import (
    ReducedSquares as ReducedSquares,
    TerminalSquares as TerminalSquares,
    rows_of as rows_of,
)

# Many unknowns: preconditioners of conjugate gradients, and a Jacobian that ranks share.
from pdeopt.optimize.squares.coarse import CoarseBasis as CoarseBasis, CoarseRows as CoarseRows
from pdeopt.optimize.squares.localparts import LocalParts as LocalParts
from pdeopt.optimize.squares.schwarz import Schwarz as Schwarz, SchwarzSettings as SchwarzSettings
from pdeopt.optimize.squares.sharedjacobian import SharedJacobian as SharedJacobian

__all__: list[str]
