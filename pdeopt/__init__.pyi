# What a user states.
from pdeopt.control.constraint import TimeDependentConstraint as TimeDependentConstraint
from pdeopt.control.stepjacobian import StepJacobian as StepJacobian, SparseStepJacobian as SparseStepJacobian
from pdeopt.control.objective import (
    Objective as Objective,
    Tracking as Tracking,
    ControlCost as ControlCost,
    TerminalLoss as TerminalLoss,
)
from pdeopt.control.controlmap import ControlMap as ControlMap, Jumps as Jumps, SmoothCost as SmoothCost
from pdeopt.control.problem import ControlProblem as ControlProblem
from pdeopt.control.timeless import (
    stationary as stationary,
    StationaryConstraint as StationaryConstraint,
    SingleNode as SingleNode,
)
from pdeopt.space.forms import FormConstraint as FormConstraint
from pdeopt.space.formobjective import FormObjective as FormObjective
from pdeopt.space.fenicsx import function_space as function_space
from pdeopt.space.layouts.layout import Layout as Layout
from pdeopt.space.unknowns import function_layout as function_layout, mesh_partitioner as mesh_partitioner
from pdeopt.space.layouts.partition import grid_layout as grid_layout, pattern_layout as pattern_layout
from pdeopt.space.spaceconstraint import SpaceConstraint as SpaceConstraint
from pdeopt.space.spreadconstraint import SpreadConstraint as SpreadConstraint
from pdeopt.space.series import write_functions as write_functions, write_series as write_series
from pdeopt.steps.timegrid import TimeGrid as TimeGrid, Steps as Steps
from pdeopt.steps.sparse import StepMatrix as StepMatrix, StepPattern as StepPattern
from pdeopt.steps.sparsity import ParameterPattern as ParameterPattern, Sparsity as Sparsity

# Smooth functions.
from pdeopt.functions.smooth import (
    SmoothFunction as SmoothFunction,
    SampledFunction as SampledFunction,
    Costs as Costs,
    Tally as Tally,
)
from pdeopt.squares.residual import ResidualFunction as ResidualFunction
from pdeopt.functions.petsc import PetscFunction as PetscFunction
from pdeopt.functions.decomposition import Decomposition as Decomposition
from pdeopt.functions.hierarchy import Hierarchy as Hierarchy, Transfer as Transfer
from pdeopt.control.reduced import ReducedObjective as ReducedObjective

# Solvers.
from pdeopt.optimize.choice import solve as solve
from pdeopt.optimize.horizon import shifted as shifted
from pdeopt.optimize.differentiable import optimum as optimum
from pdeopt.optimize.solutions.posterior import Posterior as Posterior
from pdeopt.optimize.solutions.sensitivity import Optimum as Optimum, Sensitivity as Sensitivity
from pdeopt.optimize.parts.pathterms import PathConstraint as PathConstraint
from pdeopt.optimize.parts.inequalities import InequalityReport as InequalityReport
from pdeopt.optimize.fullspace.interior import InequalityResult as InequalityResult
from pdeopt.optimize.minimization import minimize as minimize
from pdeopt.optimize.leastsquares import least_squares as least_squares
from pdeopt.optimize.results import MinimizeResult as MinimizeResult, LeastSquaresResult as LeastSquaresResult
from pdeopt.optimize.fullspace.sqp import SQPSolver as SQPSolver
from pdeopt.optimize.tao import TaoSolver as TaoSolver
from pdeopt.optimize.descent.minimizer import Minimizer as Minimizer
from pdeopt.optimize.descent.quasinewton import LBFGS as LBFGS, SSBroyden as SSBroyden
from pdeopt.optimize.descent.schwarz import SPQN as SPQN
from pdeopt.optimize.descent.trust import TrustRegionMinimizer as TrustRegionMinimizer
from pdeopt.optimize.descent.apts import APTS as APTS
from pdeopt.optimize.descent.multilevel import MGOPT as MGOPT
from pdeopt.optimize.descent.rmtr import RMTR as RMTR
from pdeopt.optimize.descent.mlvr import MLVR as MLVR
from pdeopt.optimize.descent.astrom import ASTROM as ASTROM
from pdeopt.optimize.descent.adam import Adam as Adam
from pdeopt.optimize.squares.levenberg import LevenbergMarquardt as LevenbergMarquardt
from pdeopt.optimize.squares.gaussnewton import GaussNewton as GaussNewton
from pdeopt.optimize.splitting.admm import ADMM as ADMM
from pdeopt.optimize.splitting.splitconstraint import SplitConstraint as SplitConstraint

# What they return.
from pdeopt.core.monitor import (
    Result as Result,
    ControlResult as ControlResult,
    Reason as Reason,
    Record as Record,
    DescentRecord as DescentRecord,
    LeastSquaresRecord as LeastSquaresRecord,
    History as History,
)
from pdeopt.core.errors import PdeoptError as PdeoptError, InputError as InputError, SolveFailure as SolveFailure

# How a run on several ranks ends.
from pdeopt.core.ranks import abort_ranks_on_error as abort_ranks_on_error

# Options.
from pdeopt.core.settings import Settings as Settings, setting as setting, read as read, check as check
from pdeopt.core.options import require_all_read as require_all_read

# Checks.
from pdeopt.control.metric import RieszMetric as RieszMetric
from pdeopt.control.verify import (
    assert_consistent as assert_consistent,
    taylor_rates as taylor_rates,
    taylor_remainders as taylor_remainders,
    adjoint_error as adjoint_error,
    symmetry_error as symmetry_error,
    randomize as randomize,
    DerivativeError as DerivativeError,
)
from pdeopt.optimize.checkpoint import (
    Checkpoint as Checkpoint,
    read_checkpoint as read_checkpoint,
    write_checkpoint as write_checkpoint,
)

__version__: str

__all__: list[str]
