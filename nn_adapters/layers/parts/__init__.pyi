# What surrounds a solve.
from nn_adapters.layers.parts.context import (
    SERIAL as SERIAL,
    autocast_state as autocast_state,
    communicator_name as communicator_name,
    outside_compilation as outside_compilation,
    refuse_transforms as refuse_transforms,
    sum_over_ranks as sum_over_ranks,
)

# Transformer layers, and dropout by seeds.
from nn_adapters.layers.parts.attention import EncoderBlock as EncoderBlock, later_tokens as later_tokens
from nn_adapters.layers.parts.dropout import SeededDropout as SeededDropout, drop as drop, layer_keys as layer_keys

# All dense layers by one compiled loop.
from nn_adapters.layers.parts.fusedchain import (
    FUSED_ACTIVATIONS as FUSED_ACTIVATIONS,
    FusedChain as FusedChain,
    fused_kind as fused_kind,
    is_cheaper as is_cheaper,
)

__all__: list[str]
