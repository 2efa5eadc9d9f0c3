from pdeopt.control.checkpointing import (
    CheckpointedSweeps as CheckpointedSweeps,
    CheckpointSettings as CheckpointSettings,
    ReducedPoint as ReducedPoint,
)
from pdeopt.control.constraint import TimeDependentConstraint as TimeDependentConstraint
from pdeopt.control.controlmap import (
    ControlMap as ControlMap,
    Jumps as Jumps,
    SmoothCost as SmoothCost,
    StepControls as StepControls,
)
from pdeopt.control.metric import DesignForm as DesignForm, RieszMetric as RieszMetric
from pdeopt.control.objective import (
    ControlCost as ControlCost,
    Objective as Objective,
    Sum as Sum,
    TerminalLoss as TerminalLoss,
    Tracking as Tracking,
)
from pdeopt.control.linearization import (
    Eliminated as Eliminated,
    Elimination as Elimination,
    InitialNode as InitialNode,
    Linearization as Linearization,
)
from pdeopt.control.problem import ControlProblem as ControlProblem
from pdeopt.control.timeless import (
    SingleNode as SingleNode,
    StationaryConstraint as StationaryConstraint,
    StationaryCost as StationaryCost,
    stationary as stationary,
)
from pdeopt.control.propagator import (
    Propagator as Propagator,
    PropagatorSettings as PropagatorSettings,
    from_rank_to_rank as from_rank_to_rank,
    substitute_backward as substitute_backward,
    substitute_forward as substitute_forward,
)
from pdeopt.control.reduced import (
    ReducedObjective as ReducedObjective,
    WindowFunction as WindowFunction,
    WindowSettings as WindowSettings,
)
from pdeopt.control.stepjacobian import (
    SparseStepJacobian as SparseStepJacobian,
    StepEquation as StepEquation,
    StepJacobian as StepJacobian,
)
from pdeopt.control.state_solve import (
    StateEquation as StateEquation,
    adjoint_of_steps as adjoint_of_steps,
    march as march,
    solve_steps as solve_steps,
)
from pdeopt.control.time_windows import LinearTerminal as LinearTerminal, window_problem as window_problem
from pdeopt.control.verify import (
    DerivativeError as DerivativeError,
    adjoint_error as adjoint_error,
    assert_consistent as assert_consistent,
    randomize as randomize,
    symmetry_error as symmetry_error,
    taylor_rates as taylor_rates,
    taylor_remainders as taylor_remainders,
)

__all__: list[str]
