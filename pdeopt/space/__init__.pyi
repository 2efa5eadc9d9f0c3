from pdeopt.space.forms import FormConstraint as FormConstraint
from pdeopt.space.formobjective import FormObjective as FormObjective
from pdeopt.space.fenicsx import function_space as function_space
