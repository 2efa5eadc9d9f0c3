from pdeopt.steps.matrices.krylov import (
    MatrixSolver as MatrixSolver,
    StepCounter as StepCounter,
    StepSettings as StepSettings,
    keeping_few as keeping_few,
    loosened as loosened,
)

__all__: list[str]
