from pdeopt.optimize.solutions.recorded import RecordedLagrangian as RecordedLagrangian
from pdeopt.optimize.solutions.sensitivity import Optimum as Optimum, Sensitivity as Sensitivity

__all__: list[str]
