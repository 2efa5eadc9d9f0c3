from nn_adapters.losses.depth import (
    ResNet as ResNet,
    Rescaled as Rescaled,
    depth_hierarchy as depth_hierarchy,
    operations as operations,
)
from nn_adapters.losses.logistic import LogisticLoss as LogisticLoss
from nn_adapters.losses.network import NetworkLoss as NetworkLoss

__all__: list[str]
