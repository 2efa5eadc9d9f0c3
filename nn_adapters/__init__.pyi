# Networks whose layers are solved in parallel.
from nn_adapters.layers.layerparallel import LayerParallel as LayerParallel
from nn_adapters.layers.recurrent import GRUParallel as GRUParallel
from nn_adapters.layers.blocks import LayerStack as LayerStack, activation as activation, conv as conv, dense as dense
from nn_adapters.layers.init import initialize as initialize
from nn_adapters.layers.constraint import (
    LayerConstraint as LayerConstraint,
    classification_loss as classification_loss,
    control_of as control_of,
    regression_loss as regression_loss,
)

# Losses as smooth functions.
from nn_adapters.losses.network import NetworkLoss as NetworkLoss
from nn_adapters.losses.logistic import LogisticLoss as LogisticLoss
from nn_adapters.losses.depth import ResNet as ResNet, depth_hierarchy as depth_hierarchy

# Physics-informed networks.
from nn_adapters.pinn.loss import PINN as PINN
from nn_adapters.pinn.terms import Term as Term
from nn_adapters.pinn.network import Network as Network
from nn_adapters.pinn.jets import JetBasis as JetBasis

# Training.
from nn_adapters.training.loop import Training as Training, TrainingSettings as TrainingSettings
from nn_adapters.training.lsgd import LSGD as LSGD, lsgd as lsgd
from nn_adapters.training.nested import deepen as deepen, nested_epochs as nested_epochs

# Data.
from nn_adapters.data.datasets import Dataset as Dataset, load_dataset as load_dataset

__all__: list[str]
