from pdeopt.steps.bands import BandFactor as BandFactor
from pdeopt.steps.exchange.neighbors import Neighbors as Neighbors
from pdeopt.steps.forms import real_matrix as real_matrix, require_form as require_form
from pdeopt.steps.innerproduct import InnerProduct as InnerProduct
from pdeopt.steps.matrices.krylov import (
    MatrixSolver as MatrixSolver,
    StepCounter as StepCounter,
    StepSettings as StepSettings,
    loosened as loosened,
)
from pdeopt.steps.linear_mgrit import (
    LinearMgrit as LinearMgrit,
    LinearMgritSettings as LinearMgritSettings,
    TimeSystem as TimeSystem,
)
from pdeopt.steps.mgrit import (
    IntervalMap as IntervalMap,
    Mgrit as Mgrit,
    MgritSettings as MgritSettings,
    Outcome as Outcome,
)
from pdeopt.steps.observation import Measurements as Measurements, Observation as Observation, SeenForm as SeenForm
from pdeopt.steps.matrices.products import DiagonalProduct as DiagonalProduct, PaddedProduct as PaddedProduct
from pdeopt.steps.sparse import (
    StepMatrix as StepMatrix,
    StepPattern as StepPattern,
    block_diagonal as block_diagonal,
    combination as combination,
    dense as dense,
    serial_aij as serial_aij,
)
from pdeopt.steps.sparsity import ParameterPattern as ParameterPattern, Sparsity as Sparsity
from pdeopt.steps.stepsolve import (
    StagedSubstitution as StagedSubstitution,
    StepFactor as StepFactor,
    StepInverse as StepInverse,
    StepKrylov as StepKrylov,
    StepSolver as StepSolver,
    natural_lu as natural_lu,
    step_solver as step_solver,
    superlu as superlu,
)
from pdeopt.steps.sweeps import Substitution as Substitution, substitution as substitution
from pdeopt.steps.timegrid import Steps as Steps, TimeGrid as TimeGrid
from pdeopt.steps.transfer import (
    adjoint_interpolation as adjoint_interpolation,
    injection as injection,
    interpolation as interpolation,
    piecewise_constant as piecewise_constant,
    transfer_matrix as transfer_matrix,
    whole_intervals as whole_intervals,
)
from pdeopt.steps.windows import Windows as Windows, alike as alike, sum_windows as sum_windows
from pdeopt.steps.vectorlayout import VectorLayout as VectorLayout

__all__: list[str]
