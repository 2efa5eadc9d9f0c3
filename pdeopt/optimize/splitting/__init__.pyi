from pdeopt.optimize.splitting.splitconstraint import SplitConstraint as SplitConstraint, SplitWork as SplitWork
from pdeopt.optimize.splitting.admm import ADMM as ADMM, AdmmSettings as AdmmSettings

__all__: list[str]
