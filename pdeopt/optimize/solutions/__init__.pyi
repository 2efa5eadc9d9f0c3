from pdeopt.optimize.solutions.recorded import RecordedLagrangian as RecordedLagrangian
from pdeopt.optimize.solutions.posterior import Posterior as Posterior
from pdeopt.optimize.solutions.precision import Precision as Precision
from pdeopt.optimize.solutions.sensitivity import (
    Optimum as Optimum,
    Sensitivity as Sensitivity,
    require_solution as require_solution,
)

__all__: list[str]
