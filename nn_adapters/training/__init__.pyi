# The loop, and what it is made of.
from nn_adapters.training.cyclecontrol import CycleControl as CycleControl, GradientBias as GradientBias
from nn_adapters.training.graphs import CapturedGradient as CapturedGradient, CudaGraph as CudaGraph
from nn_adapters.training.loop import Epoch as Epoch, Training as Training
from nn_adapters.training.trainingsettings import (
    FIRST_ORDER as FIRST_ORDER,
    TrainingSettings as TrainingSettings,
    named_optimizer as named_optimizer,
    set_rate as set_rate,
)
from nn_adapters.training.checkpoint import load_checkpoint as load_checkpoint, save_checkpoint as save_checkpoint
from nn_adapters.training.regularize import regularized as regularized, smoothness as smoothness, tikhonov as tikhonov

# Large batches.
from nn_adapters.training.layerwise import (
    LAMB as LAMB,
    LARS as LARS,
    LayerwiseOptimizer as LayerwiseOptimizer,
    layerwise_groups as layerwise_groups,
)

from nn_adapters.training.rates import (
    COURSES as COURSES,
    SCALINGS as SCALINGS,
    Course as Course,
    scaled_rate as scaled_rate,
)
from nn_adapters.training.augment import RunningMixup as RunningMixup, erase_rectangles as erase_rectangles

# Ways to train.
from nn_adapters.training.last_layer import (
    LSGD as LSGD,
    Triangle as Triangle,
    least_squares as least_squares,
    lsgd as lsgd,
)
from nn_adapters.training.nested import (
    deepen as deepen,
    nested_epochs as nested_epochs,
    refine_weights as refine_weights,
)

__all__: list[str]
