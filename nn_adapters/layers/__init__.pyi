from nn_adapters.layers.batched import batched as batched
from nn_adapters.layers.blocks import (
    Direct as Direct,
    LayerStack as LayerStack,
    SmoothReLU as SmoothReLU,
    activation as activation,
    conv as conv,
    dense as dense,
    step as step,
)
from nn_adapters.layers.constraint import (
    LayerConstraint as LayerConstraint,
    LayerJacobian as LayerJacobian,
    classification_loss as classification_loss,
    control_of as control_of,
    regression_loss as regression_loss,
)
from nn_adapters.layers.densestep import (
    DenseLinearized as DenseLinearized,
    DenseStep as DenseStep,
    add as add,
    is_dense as is_dense,
)
from nn_adapters.layers.init import (
    box_linear as box_linear,
    box_neurons as box_neurons,
    box_stack as box_stack,
    box_weights as box_weights,
    initialize as initialize,
)
from nn_adapters.layers.layer_mgrit import (
    Hierarchy as Hierarchy,
    Linearized as Linearized,
    Pieces as Pieces,
    Propagation as Propagation,
)
from nn_adapters.layers.layerparallel import (
    LayerParallel as LayerParallel,
    exactly as exactly,
    layer_step as layer_step,
    measure_bias as measure_bias,
    parallel_parts as parallel_parts,
)
from nn_adapters.layers.recurrent import (
    GRUParallel as GRUParallel,
    sum_gradient_over_ranks as sum_gradient_over_ranks,
    classic as classic,
    implicit as implicit,
)

__all__: list[str]
