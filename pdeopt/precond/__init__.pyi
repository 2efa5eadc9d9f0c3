# The contract.
from pdeopt.precond.base import Preconditioner as Preconditioner

# Preconditioners of KKT matrices.
from pdeopt.precond.wathen import WathenPC as WathenPC, WathenSettings as WathenSettings
from pdeopt.precond.reduced import (
    ControlBlock as ControlBlock,
    ReducedHessian as ReducedHessian,
    ReducedPC as ReducedPC,
)
from pdeopt.precond.blockjacobi import (
    BlockJacobiSettings as BlockJacobiSettings,
    TimeBlockJacobi as TimeBlockJacobi,
    WindowFactors as WindowFactors,
)
from pdeopt.precond.circulant import CirculantPC as CirculantPC
from pdeopt.precond.timemg import TimeMultigridPC as TimeMultigridPC
from pdeopt.precond.direct import KKTDirectPC as KKTDirectPC, factor_kkt as factor_kkt, use_direct as use_direct

# Approximations of the Schur complement.
from pdeopt.precond.schur import (
    ExactSchur as ExactSchur,
    MatchedBlock as MatchedBlock,
    PropagatedSchur as PropagatedSchur,
    use_schur_multigrid as use_schur_multigrid,
)
from pdeopt.precond.matching import matched_shift as matched_shift

# What is constant in time.
from pdeopt.precond.frequencies import Frequencies as Frequencies, mean as mean

# Levels in time.
from pdeopt.precond.levels import (
    Level as Level,
    TimeMultigridSettings as TimeMultigridSettings,
    fill_multigrid as fill_multigrid,
    hierarchy as hierarchy,
    transfer as transfer,
)

# Matrices of blocks.
from pdeopt.precond.operator import (
    BlockMatrix as BlockMatrix,
    BlockOperator as BlockOperator,
    GalerkinOperator as GalerkinOperator,
    SchurOperator as SchurOperator,
    blocks_of as blocks_of,
    leave as leave,
    operator_of as operator_of,
)
from pdeopt.precond.carrying import CarryingCG as CarryingCG, carrying_cg as carrying_cg

__all__: list[str]
