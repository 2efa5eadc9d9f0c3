# Kernels.
from pdeopt.lowrank.kernels import (
    Gaussian as Gaussian,
    Kernel as Kernel,
    Laplace as Laplace,
    Matern as Matern,
    Polynomial as Polynomial,
    kernel_of as kernel_of,
)

# Their matrices: blocks of low rank, factors, and what PETSc sees.
from pdeopt.lowrank.clusters import ClusterTree as ClusterTree, TreeLevel as TreeLevel
from pdeopt.lowrank.hodlr import HierarchicalKernel as HierarchicalKernel
from pdeopt.lowrank.symmetric import SymmetricFactor as SymmetricFactor
from pdeopt.lowrank.pivoted import PivotedCholesky as PivotedCholesky, inverse_root as inverse_root
from pdeopt.lowrank.centers import CenterFactor as CenterFactor
from pdeopt.lowrank.hierarchical import (
    HierarchicalPC as HierarchicalPC,
    HierarchicalSettings as HierarchicalSettings,
    KernelMatrix as KernelMatrix,
)

# Priors of fields.
from pdeopt.lowrank.prior import GaussianPrior as GaussianPrior

# Many dimensions, and regression.
from pdeopt.lowrank.features import (
    FeatureRidge as FeatureRidge,
    KernelFeatures as KernelFeatures,
    NystromFeatures as NystromFeatures,
    RandomFeatures as RandomFeatures,
    k_means as k_means,
)
from pdeopt.lowrank.ridge import METHODS as METHODS, KernelRidge as KernelRidge, RidgeSettings as RidgeSettings

# Kronecker factors.
from pdeopt.lowrank.kronecker import (
    KroneckerBlocks as KroneckerBlocks,
    KroneckerMetric as KroneckerMetric,
    KroneckerPC as KroneckerPC,
    inverse_factor as inverse_factor,
    root_factor as root_factor,
)
from pdeopt.lowrank.kroneckerbatches import KroneckerBatches as KroneckerBatches, FactorPair as FactorPair

__all__: list[str]
