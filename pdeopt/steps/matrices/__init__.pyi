from pdeopt.steps.matrices.krylov import (
    MatrixSolver as MatrixSolver,
    StepCounter as StepCounter,
    StepSettings as StepSettings,
    loosened as loosened,
)

__all__: list[str]
