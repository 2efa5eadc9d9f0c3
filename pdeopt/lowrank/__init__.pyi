# Kernels.
from pdeopt.lowrank.kernels import (
    Gaussian as Gaussian,
    Kernel as Kernel,
    Laplace as Laplace,
    Matern as Matern,
    Polynomial as Polynomial,
    kernel_of as kernel_of,
)

__all__: list[str]
