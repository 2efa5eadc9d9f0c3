from nn_adapters.training.loop import (
    Bias as Bias,
    Epoch as Epoch,
    Groups as Groups,
    Training as Training,
    TrainingSettings as TrainingSettings,
)
from nn_adapters.training.lsgd import LSGD as LSGD, Triangle as Triangle, least_squares as least_squares, lsgd as lsgd
from nn_adapters.training.nested import deepen as deepen, refine as refine, schedule as schedule
from nn_adapters.training.regularize import smoothness as smoothness, tikhonov as tikhonov

__all__: list[str]
