from pdeopt.steps.matrices.krylov import (
    MatrixSolver as MatrixSolver,
    StepCounter as StepCounter,
    StepSettings as StepSettings,
    keep_few as keep_few,
    loosened as loosened,
)

__all__: list[str]
