from pdeopt.precond.blockjacobi import (
    BlockJacobiSettings as BlockJacobiSettings,
    TimeBlockJacobi as TimeBlockJacobi,
    WindowFactors as WindowFactors,
)
from pdeopt.precond.direct import KKTDirectPC as KKTDirectPC, factor_kkt as factor_kkt, use_direct as use_direct
from pdeopt.precond.operator import (
    BlockOperator as BlockOperator,
    SchurOperator as SchurOperator,
    blocks_of as blocks_of,
    leave as leave,
    operator_of as operator_of,
    shell as shell,
)
from pdeopt.precond.timemg import (
    GalerkinOperator as GalerkinOperator,
    Idle as Idle,
    Level as Level,
    MatchedBlock as MatchedBlock,
    SchurMultigrid as SchurMultigrid,
    TimeMultigridPC as TimeMultigridPC,
    TimeMultigridSettings as TimeMultigridSettings,
    hierarchy as hierarchy,
    multigrid_settings as multigrid_settings,
)
from pdeopt.precond.wathen import (
    ExactSchur as ExactSchur,
    PropagatedSchur as PropagatedSchur,
    WathenPC as WathenPC,
    WathenSettings as WathenSettings,
    resolve as resolve,
)

__all__: list[str]
