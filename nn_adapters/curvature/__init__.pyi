# Losses, and the Fisher matrix of their outputs.
from nn_adapters.curvature.likelihoods import (
    CrossEntropy as CrossEntropy,
    Likelihood as Likelihood,
    SquaredError as SquaredError,
)

# Layers, their Kronecker factors, and products without any.
from nn_adapters.curvature.layers import CurvedLayer as CurvedLayer, curved_layers as curved_layers
from nn_adapters.curvature.factors import KroneckerFactors as KroneckerFactors
from nn_adapters.curvature.chains import SerialChain as SerialChain, shared_copy as shared_copy
from nn_adapters.curvature.curvednetwork import CurvedNetwork as CurvedNetwork
from nn_adapters.curvature.products import FisherMatrix as FisherMatrix, by_layer as by_layer, flat as flat

from nn_adapters.curvature.spectrum import (
    Eigenvalue as Eigenvalue,
    HessianMatrix as HessianMatrix,
    Spectrum as Spectrum,
    Tridiagonal as Tridiagonal,
    lanczos as lanczos,
    largest_eigenvalue as largest_eigenvalue,
    spectral_density as spectral_density,
)

# Metrics of trust regions.
from nn_adapters.curvature.networkmetric import (
    FactorSettings as FactorSettings,
    NetworkMetric as NetworkMetric,
    likelihood_of as likelihood_of,
)

# Optimizers.
from nn_adapters.curvature.kfac import KFAC as KFAC, KFACSettings as KFACSettings
from nn_adapters.curvature.hessianfree import (
    NATURAL as NATURAL,
    HessianFree as HessianFree,
    HessianFreeSettings as HessianFreeSettings,
)
from nn_adapters.curvature.secondorder import SecondOrder as SecondOrder
from nn_adapters.curvature.choice import (
    SECOND_ORDER as SECOND_ORDER,
    second_order as second_order,
    second_order_settings as second_order_settings,
)
from nn_adapters.curvature.memories import recall_whole as recall_whole, whole_memory as whole_memory

__all__: list[str]
