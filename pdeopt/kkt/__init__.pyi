from pdeopt.kkt.assembly import KKTAssembly as KKTAssembly, require_pattern as require_pattern
from pdeopt.kkt.blocks import KKTBlocks as KKTBlocks, sees_all_states as sees_all_states
from pdeopt.kkt.coupled import CoupledKKT as CoupledKKT, CoupledLayout as CoupledLayout
from pdeopt.kkt.layout import KKTLayout as KKTLayout, selection as selection
from pdeopt.kkt.operator import KKTOperator as KKTOperator
from pdeopt.kkt.refinement import Refinement as Refinement
from pdeopt.kkt.parameters import Parameters as Parameters, ParameterValues as ParameterValues

__all__: list[str]
