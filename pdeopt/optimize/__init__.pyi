# One call for a control problem.
from pdeopt.optimize.coarse_time import time_hierarchy as time_hierarchy, with_coarse_space as with_coarse_space
from pdeopt.optimize.choice import SolveSettings as SolveSettings, solve as solve
from pdeopt.optimize.horizon import shifted as shifted
from pdeopt.optimize.differentiable import optimum as optimum

# SciPy's way.
from pdeopt.optimize.minimization import minimize as minimize
from pdeopt.optimize.leastsquares import (
    UserResiduals as UserResiduals,
    black_box as black_box,
    least_squares as least_squares,
)
from pdeopt.optimize.results import (
    LeastSquaresResult as LeastSquaresResult,
    MinimizeResult as MinimizeResult,
    NamedResult as NamedResult,
)
from pdeopt.optimize.bounded import BoundedLBFGS as BoundedLBFGS

# TAO's.
from pdeopt.optimize.tao import TaoSettings as TaoSettings, TaoSolver as TaoSolver

# Optimizers by name: -tao_type python -tao_python_type pdeopt.optimize.SSBroyden.
from pdeopt.optimize.descent.adam import Adam as Adam
from pdeopt.optimize.descent.quasinewton import LBFGS as LBFGS, SSBroyden as SSBroyden
from pdeopt.optimize.descent.schwarz import SPQN as SPQN
from pdeopt.optimize.descent.trust import TrustRegionMinimizer as TrustRegionMinimizer
from pdeopt.optimize.descent.apts import APTS as APTS
from pdeopt.optimize.descent.multilevel import MGOPT as MGOPT
from pdeopt.optimize.descent.rmtr import RMTR as RMTR
from pdeopt.optimize.descent.mlvr import MLVR as MLVR
from pdeopt.optimize.descent.astrom import ASTROM as ASTROM
from pdeopt.optimize.squares.levenberg import LevenbergMarquardt as LevenbergMarquardt
from pdeopt.optimize.squares.gaussnewton import GaussNewton as GaussNewton
from pdeopt.optimize.curvedproblem import (
    CurvedObjective as CurvedObjective,
    CurvedSettings as CurvedSettings,
    curved_function as curved_function,
)

# Interrupted runs.
from pdeopt.optimize.checkpoint import (
    Checkpoint as Checkpoint,
    CheckpointFile as CheckpointFile,
    read_checkpoint as read_checkpoint,
    read_memory as read_memory,
    write_checkpoint as write_checkpoint,
    write_memory as write_memory,
)

__all__: list[str]
