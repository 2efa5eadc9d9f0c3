# Networks whose layers or time steps are solved in parallel.
from nn_adapters.layers.layerparallel import LayerParallel as LayerParallel
from nn_adapters.layers.layerlist import LayerList as LayerList
from nn_adapters.layers.given import layer_step as layer_step
from nn_adapters.layers.parts.grugates import (
    GRU_STEPS as GRU_STEPS,
    classic_step as classic_step,
    implicit_step as implicit_step,
)
from nn_adapters.layers.recurrent import (
    SEQUENCES as SEQUENCES,
    GRUParallel as GRUParallel,
    GRUStack as GRUStack,
    sum_gradient_over_ranks as sum_gradient_over_ranks,
)
from nn_adapters.layers.parallelmodule import (
    ParallelModule as ParallelModule,
    approximately as approximately,
    clip_grad_norm_ as clip_grad_norm_,
    exactly as exactly,
    measure_bias as measure_bias,
    mgrit_solvers as mgrit_solvers,
    parameter_groups as parameter_groups,
    serial_network as serial_network,
    stacked_parameters as stacked_parameters,
)
from nn_adapters.layers.parts.attention import EncoderBlock as EncoderBlock, later_tokens as later_tokens
from nn_adapters.layers.parts.splines import (
    DepthSpline as DepthSpline,
    spline_basis as spline_basis,
    spline_coefficients as spline_coefficients,
)
from nn_adapters.layers.parts.stacking import ParameterStack as ParameterStack
from nn_adapters.layers.stackedlayers import StackedLayers as StackedLayers

# Blocks, and the network that is the reference.
from nn_adapters.layers.blocks import (
    ACTIVATIONS as ACTIVATIONS,
    Direct as Direct,
    LayerStack as LayerStack,
    SmoothReLU as SmoothReLU,
    SteppingBlock as SteppingBlock,
    WeightNormalization as WeightNormalization,
    activation as activation,
    conv as conv,
    dense as dense,
    weight_norm as weight_norm,
)

# First weights.
from nn_adapters.layers.init import (
    INITIALIZATIONS as INITIALIZATIONS,
    box_linear as box_linear,
    box_neurons as box_neurons,
    box_stack as box_stack,
    box_weights as box_weights,
    initialize as initialize,
)

# A network as the constraint of a control problem.
from nn_adapters.layers.constraint import LayerConstraint as LayerConstraint, control_of as control_of

# Chains of steps: the solver, steps, and their derivatives.
from nn_adapters.layers.layer_mgrit import LayerMgrit as LayerMgrit
from nn_adapters.layers.layersolve import LARGEST_MISFIT as LARGEST_MISFIT, solve_layers as solve_layers
from nn_adapters.layers.parts.layerstep import (
    AutogradLinearized as AutogradLinearized,
    AutogradStep as AutogradStep,
    LayerStep as LayerStep,
    LinearizedSteps as LinearizedSteps,
    StepLength as StepLength,
)
from nn_adapters.layers.densestep import (
    DenseLinearized as DenseLinearized,
    DenseStep as DenseStep,
    add_scaled as add_scaled,
    is_dense as is_dense,
)
from nn_adapters.layers.batching import Batched as Batched, batched as batched

__all__: list[str]
