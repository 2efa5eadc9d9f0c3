from nn_adapters.splitting.affinemaps import (
    AffineMap as AffineMap,
    Averaged as Averaged,
    Convolution as Convolution,
    Dense as Dense,
)
from nn_adapters.splitting.proximal import (
    LOSSES as LOSSES,
    SPLIT_ACTIVATIONS as SPLIT_ACTIVATIONS,
    Loss as Loss,
    PiecewiseLinear as PiecewiseLinear,
    Smooth as Smooth,
)
from nn_adapters.splitting.splitlayers import SplitLayer as SplitLayer, split_layers as split_layers
from nn_adapters.splitting.splitstates import SplitStates as SplitStates
from nn_adapters.splitting.wholestates import WholeStates as WholeStates
from nn_adapters.splitting.layersplitting import (
    LayerSplitting as LayerSplitting,
    SplitTrainingSettings as SplitTrainingSettings,
)
from nn_adapters.splitting.streamedlayers import StreamedLayers as StreamedLayers
from nn_adapters.splitting.wholelayers import WholeLayers as WholeLayers

__all__: list[str]
