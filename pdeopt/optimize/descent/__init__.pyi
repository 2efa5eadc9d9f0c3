from pdeopt.optimize.descent.adam import Adam as Adam, AdamSettings as AdamSettings
from pdeopt.optimize.descent.apts import APTS as APTS, APTSSettings as APTSSettings
from pdeopt.optimize.descent.astrom import ASTROM as ASTROM, ASTROMSettings as ASTROMSettings, around as around
from pdeopt.optimize.descent.minimizer import (
    Minimizer as Minimizer,
    StopSettings as StopSettings,
    flattened as flattened,
    part_of as part_of,
)
from pdeopt.optimize.descent.mlvr import MLVR as MLVR, MLVRSettings as MLVRSettings
from pdeopt.optimize.descent.multilevel import (
    MGOPT as MGOPT,
    MGOPTSettings as MGOPTSettings,
    Multilevel as Multilevel,
    MultilevelSettings as MultilevelSettings,
)
from pdeopt.optimize.descent.quasinewton import (
    LBFGS as LBFGS,
    LBFGSSettings as LBFGSSettings,
    QuasiNewton as QuasiNewton,
    SSBroyden as SSBroyden,
    SSBroydenSettings as SSBroydenSettings,
    first_step_setting as first_step_setting,
    gap_setting as gap_setting,
    search_setting as search_setting,
)
from pdeopt.optimize.descent.rmtr import RMTR as RMTR, RMTRSettings as RMTRSettings, TrustSmoother as TrustSmoother
from pdeopt.optimize.descent.localsolves import LocalSolves as LocalSolves, quasi_newton as quasi_newton
from pdeopt.optimize.descent.schwarz import (
    CoarseSpace as CoarseSpace,
    SPQN as SPQN,
    SPQNSettings as SPQNSettings,
    search_along as search_along,
)
from pdeopt.optimize.descent.supportnewton import (
    SupportNewtonSettings as SupportNewtonSettings,
    SupportVectorNewton as SupportVectorNewton,
    labels_of as labels_of,
)
from pdeopt.optimize.descent.taotype import Solver as Solver, TaoFunction as TaoFunction, solve as solve
from pdeopt.optimize.descent.trustsettings import (
    BatchSettings as BatchSettings,
    ModelSettings as ModelSettings,
    RadiusSettings as RadiusSettings,
    RatioSettings as RatioSettings,
)
from pdeopt.optimize.descent.trust import TrustRegionMinimizer as TrustRegionMinimizer, TrustSettings as TrustSettings

__all__: list[str]
