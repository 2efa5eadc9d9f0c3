from pdeopt.optimize.parts.bounds import Bounds as Bounds
from pdeopt.optimize.parts.inequalities import Inequalities as Inequalities, InequalityReport as InequalityReport
from pdeopt.optimize.parts.inversehessian import (
    DenseInverse as DenseInverse,
    InverseHessian as InverseHessian,
    LimitedMemory as LimitedMemory,
    broyden as broyden,
)
from pdeopt.optimize.parts.loop import Method as Method, Observer as Observer, iterate as iterate
from pdeopt.optimize.parts.linesearch import (
    Backtracking as Backtracking,
    Ray as Ray,
    Search as Search,
    StrongWolfe as StrongWolfe,
)
from pdeopt.optimize.parts.lsr1 import LSR1 as LSR1, LowRank as LowRank, SR1 as SR1
from pdeopt.optimize.parts.metricmodel import (
    METRICS as METRICS,
    InCoordinates as InCoordinates,
    MetricModel as MetricModel,
)
from pdeopt.optimize.parts.pathterms import PathConstraint as PathConstraint
from pdeopt.optimize.parts.progress import Doubt as Doubt, Stagnation as Stagnation
from pdeopt.optimize.parts.subspace import Columns as Columns, Correction as Correction
from pdeopt.optimize.parts.trustmodel import (
    EuclideanModel as EuclideanModel,
    FirstOrder as FirstOrder,
    HessianProducts as HessianProducts,
    MetricAlone as MetricAlone,
    Secant as Secant,
    TrustModel as TrustModel,
    trust_model as trust_model,
)
from pdeopt.optimize.parts.trustregion import (
    RatioRule as RatioRule,
    TrustRegion as TrustRegion,
    has_vanished as has_vanished,
    reduction_ratio as reduction_ratio,
)
from pdeopt.optimize.parts.trustsubproblem import (
    TrustStep as TrustStep,
    boxed as boxed,
    first_order as first_order,
    length as length,
    spectral as spectral,
    steihaug as steihaug,
)

__all__: list[str]
