# Losses of scores as objectives, and prices of weights.
from nn_adapters.control.scoreloss import (
    ScoreLoss as ScoreLoss,
    classification_loss as classification_loss,
    regression_loss as regression_loss,
)
from nn_adapters.control.designcost import DesignCost as DesignCost, ParameterCost as ParameterCost

# Dense residual networks by hand.
from nn_adapters.control.chain import DenseChain as DenseChain, SweepCount as SweepCount
from nn_adapters.control.densenetwork import DenseNetwork as DenseNetwork
from nn_adapters.control.intervals import exact_cycles as exact_cycles, few_cycles as few_cycles
from nn_adapters.control.oneshot import OneShotNetwork as OneShotNetwork
from nn_adapters.control.factors import DenseFactors as DenseFactors

# Any network, by derivatives of PyTorch.
from nn_adapters.control.networkfunction import (
    NetworkFactors as NetworkFactors,
    NetworkFunction as NetworkFunction,
    NetworkPoint as NetworkPoint,
)

__all__: list[str]
