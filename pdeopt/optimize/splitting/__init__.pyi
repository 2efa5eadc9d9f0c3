from pdeopt.optimize.splitting.splitconstraint import (
    PairedConstraint as PairedConstraint,
    SplitConstraint as SplitConstraint,
    SplitWork as SplitWork,
)
from pdeopt.optimize.splitting.couplings import Couplings as Couplings
from pdeopt.optimize.splitting.pair import Pair as Pair
from pdeopt.optimize.splitting.admm import ADMM as ADMM, AdmmSettings as AdmmSettings
from pdeopt.optimize.splitting.supportvectors import SupportVectors as SupportVectors

# Windows of time steps.
from pdeopt.optimize.splitting.timesplitting import (
    CONTROL_DEFAULTS as CONTROL_DEFAULTS,
    TimeSplitting as TimeSplitting,
    TimeSplittingSettings as TimeSplittingSettings,
)

__all__: list[str]
