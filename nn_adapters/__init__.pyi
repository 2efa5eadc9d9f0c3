# Networks whose layers or time steps are solved in parallel, and the error of their gradients.
from nn_adapters.layers.layerlist import LayerList as LayerList
from nn_adapters.layers.layerparallel import LayerParallel as LayerParallel
from nn_adapters.layers.recurrent import (
    GRUParallel as GRUParallel,
    GRUStack as GRUStack,
    sum_gradient_over_ranks as sum_gradient_over_ranks,
)
from nn_adapters.layers.parallelmodule import (
    approximately as approximately,
    clip_grad_norm_ as clip_grad_norm_,
    exactly as exactly,
    measure_bias as measure_bias,
    mgrit_solvers as mgrit_solvers,
    parameter_groups as parameter_groups,
    serial_network as serial_network,
)
from pdeopt.steps.mgrit import MgritSettings as MgritSettings

# Blocks, the network that is the reference, and first weights.
from nn_adapters.layers.blocks import (
    ACTIVATIONS as ACTIVATIONS,
    Direct as Direct,
    LayerStack as LayerStack,
    SteppingBlock as SteppingBlock,
    activation as activation,
    conv as conv,
    dense as dense,
    weight_norm as weight_norm,
)
from nn_adapters.layers.init import INITIALIZATIONS as INITIALIZATIONS, initialize as initialize

# A network as the constraint of a control problem.
from nn_adapters.layers.constraint import LayerConstraint as LayerConstraint, control_of as control_of
from nn_adapters.control.scoreloss import classification_loss as classification_loss, regression_loss as regression_loss
from nn_adapters.control.designcost import ParameterCost as ParameterCost
from nn_adapters.control.networkfunction import NetworkFunction as NetworkFunction

# How ranks share the training of a network.
from nn_adapters.parallel.groups import Groups as Groups
from nn_adapters.parallel.gradientsums import GradientSums as GradientSums, share_weights as share_weights
from nn_adapters.parallel.pipeline import Pipeline as Pipeline
from nn_adapters.parallel.domainparallel import DomainParallel as DomainParallel
from nn_adapters.parallel.hogwild import Hogwild as Hogwild
from nn_adapters.parallel.weightserver import WeightServer as WeightServer
from nn_adapters.parallel.twolevel import TwoLevelSums as TwoLevelSums

# Losses as smooth functions, and networks of several depths.
from nn_adapters.losses.network import NetworkLoss as NetworkLoss
from nn_adapters.losses.squares import NetworkSquares as NetworkSquares
from nn_adapters.losses.logistic import LogisticLoss as LogisticLoss
from nn_adapters.losses.depth import ResNet as ResNet, depth_hierarchy as depth_hierarchy

# Curvature of networks, and optimizers made of it.
from nn_adapters.curvature.likelihoods import CrossEntropy as CrossEntropy, SquaredError as SquaredError
from nn_adapters.curvature.kfac import KFAC as KFAC, KFACSettings as KFACSettings
from nn_adapters.curvature.networkmetric import FactorSettings as FactorSettings
from nn_adapters.curvature.secondorder import SecondOrder as SecondOrder
from nn_adapters.curvature.hessianfree import (
    NATURAL as NATURAL,
    HessianFree as HessianFree,
    HessianFreeSettings as HessianFreeSettings,
)
from nn_adapters.curvature.spectrum import (
    HessianMatrix as HessianMatrix,
    largest_eigenvalue as largest_eigenvalue,
    spectral_density as spectral_density,
)

# Physics-informed networks.
from nn_adapters.pinn.loss import PINN as PINN
from nn_adapters.pinn.terms import Field as Field, Residual as Residual, Term as Term
from nn_adapters.pinn.network import NETWORK_BODIES as NETWORK_BODIES, Network as Network
from nn_adapters.pinn.activations import ACTIVATION_NAMES as ACTIVATION_NAMES
from nn_adapters.pinn.jets import JetBasis as JetBasis
from nn_adapters.pinn.features import Features as Features, periodic as periodic, stretched as stretched
from nn_adapters.pinn.balance import BALANCES as BALANCES
from nn_adapters.pinn.points import (
    POINT_SAMPLERS as POINT_SAMPLERS,
    Intervals as Intervals,
    adaptive_points as adaptive_points,
    hammersley as hammersley,
    into_box as into_box,
    latin_hypercube as latin_hypercube,
    uniform_points as uniform_points,
    within as within,
)
from nn_adapters.pinn.domains import MeshDomain as MeshDomain, PolygonFactor as PolygonFactor

# Training.
from nn_adapters.training.last_layer import LSGD as LSGD, least_squares as least_squares, lsgd as lsgd
from nn_adapters.training.loop import Epoch as Epoch, Training as Training
from nn_adapters.training.graphs import CapturedGradient as CapturedGradient
from nn_adapters.training.trainingsettings import TrainingSettings as TrainingSettings
from nn_adapters.training.nested import (
    deepen as deepen,
    nested_epochs as nested_epochs,
    refine_weights as refine_weights,
)
from nn_adapters.training.regularize import smoothness as smoothness, tikhonov as tikhonov
from nn_adapters.training.layerwise import LAMB as LAMB, LARS as LARS, layerwise_groups as layerwise_groups
from nn_adapters.training.rates import Course as Course, scaled_rate as scaled_rate
from nn_adapters.training.augment import RunningMixup as RunningMixup, erase_rectangles as erase_rectangles

# Training by splitting.
from nn_adapters.splitting.layersplitting import SplitTrainingSettings as SplitTrainingSettings
from nn_adapters.splitting.streamedlayers import StreamedLayers as StreamedLayers
from nn_adapters.splitting.wholelayers import WholeLayers as WholeLayers

# Compression of trained networks.
from nn_adapters.compression.choice import Compressed as Compressed, compress as compress
from nn_adapters.compression.lowrank import LowRankLayers as LowRankLayers
from nn_adapters.compression.methods import Pruning as Pruning, Quantization as Quantization
from nn_adapters.compression.forms import multiplications as multiplications, stored_bytes as stored_bytes
from nn_adapters.compression.attacks import accuracy as accuracy, fgsm as fgsm

# Data.
from nn_adapters.data.dataset import Dataset as Dataset, make_dataset as make_dataset
from nn_adapters.data.datasets import DATASET_NAMES as DATASET_NAMES, load_dataset as load_dataset

__all__: list[str]
