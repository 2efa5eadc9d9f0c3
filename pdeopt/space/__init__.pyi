from pdeopt.space.forms import FormConstraint as FormConstraint
from pdeopt.space.formobjective import FormObjective as FormObjective
from pdeopt.space.fenicsx import function_space as function_space
from pdeopt.space.unknowns import function_layout as function_layout, mesh_partitioner as mesh_partitioner
from pdeopt.space.series import write_functions as write_functions, write_series as write_series
from pdeopt.space.spaceconstraint import SpaceConstraint as SpaceConstraint
from pdeopt.space.spreadconstraint import SpreadConstraint as SpreadConstraint
from pdeopt.space.spacejacobian import AffineStepJacobian as AffineStepJacobian, SpaceStepJacobian as SpaceStepJacobian
