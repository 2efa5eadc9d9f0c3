from nn_adapters.losses.network import Loss as Loss, NetworkLoss as NetworkLoss
from nn_adapters.losses.squares import NetworkSquares as NetworkSquares
from nn_adapters.losses.logistic import LOGISTIC_COSTS as LOGISTIC_COSTS, LogisticLoss as LogisticLoss
from nn_adapters.losses.depth import (
    ResNet as ResNet,
    Rescaled as Rescaled,
    depth_hierarchy as depth_hierarchy,
    operations as operations,
)

__all__: list[str]
