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

__all__: list[str]
