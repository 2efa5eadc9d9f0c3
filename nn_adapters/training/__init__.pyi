from nn_adapters.training.loop import (
    GradientBias as GradientBias,
    Epoch as Epoch,
    RankGroups as RankGroups,
    Training as Training,
    TrainingSettings as TrainingSettings,
)
from nn_adapters.training.lsgd import LSGD as LSGD, Triangle as Triangle, least_squares as least_squares, lsgd as lsgd
from nn_adapters.training.nested import (
    deepen as deepen,
    refine_weights as refine_weights,
    nested_epochs as nested_epochs,
)
from nn_adapters.training.regularize import smoothness as smoothness, tikhonov as tikhonov

__all__: list[str]
