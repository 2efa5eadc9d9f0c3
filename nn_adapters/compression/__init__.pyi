# What a network takes.
from nn_adapters.compression.forms import (
    StoredWeight as StoredWeight,
    multiplications as multiplications,
    stored as stored,
    stored_bytes as stored_bytes,
)

# Layers, what they are called with, and their smaller versions.
from nn_adapters.compression.inputs import (
    InputMoments as InputMoments,
    compressible as compressible,
    input_moments as input_moments,
    replaced as replaced,
)
from nn_adapters.compression.methods import (
    Compression as Compression,
    Variant as Variant,
    Pruning as Pruning,
    Quantization as Quantization,
)
from nn_adapters.compression.lowrank import LowRankLayers as LowRankLayers

# The choice, and what it has cost.
from nn_adapters.compression.choice import Compressed as Compressed, compress as compress
from nn_adapters.compression.attacks import accuracy as accuracy, fgsm as fgsm

__all__: list[str]
