"""What a person does, from the motion of a telephone: 128 steps of 9 signals, 6 classes, by a GRU in parallel.

python -m problems.har_gru -epochs 5                          # generated signals
python -m problems.har_gru -data har -data_dir DATA -epochs 8
mpiexec -n 2 python -m problems.har_gru -kind classic
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from nn_adapters.data.dataset import Dataset
from nn_adapters.data.datasets import load_dataset
from nn_adapters.layers.recurrent import GRUParallel
from pdeopt.core.settings import Settings, setting
from pdeopt.steps.mgrit import MgritSettings
from problems.shared import layer_training as training
from problems.shared.case import start


@dataclass(frozen=True)
class SequenceSettings(Settings):
    """The network and its sequences."""

    data: str = setting("synthetic_har", "data set", choices=("synthetic_har", "har"))
    hidden: int = setting(100, "hidden units", at_least=1)
    gru_layers: int = setting(2, "stacked units", at_least=1)
    kind: str = setting("implicit", "unit", choices=("implicit", "classic"))


class Classifier(nn.Module):
    """Stacked GRUs and a closing layer on the last hidden state."""

    def __init__(self, data: Dataset, settings: SequenceSettings, comm: Any, mgrit: MgritSettings) -> None:
        super().__init__()
        _, steps, signals = data.x_train.shape
        self.gru = GRUParallel(comm, signals, settings.hidden, steps, settings.gru_layers, settings.kind, mgrit)
        self.closing = nn.Linear(settings.hidden, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.closing(self.gru(x))  # type: ignore[no-any-return]


def standardized(data: Dataset) -> Dataset:
    """Signals with mean 0 and deviation 1 over the training samples: accelerations and rates are of unlike size."""
    mean, deviation = data.x_train.mean((0, 1)), data.x_train.std((0, 1)).clamp(min=1e-6)
    return replace(data, x_train=(data.x_train - mean) / deviation, x_test=(data.x_test - mean) / deviation)


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the weights run serially."""

    def data(own: SequenceSettings, output: training.OutputSettings, seed: int) -> Dataset:
        return standardized(load_dataset(own.data, output.data_dir, output.fetch, seed))

    def make(settings: SequenceSettings, comm: Any, mgrit: MgritSettings, data: Dataset) -> nn.Module:
        return Classifier(data, settings, comm, mgrit)

    mgrit = MgritSettings(coarsening="4", levels=2, cycles=2, adjoint_cycles=1, relaxation="FCF")
    return training.main("har_gru", __doc__ or "", SequenceSettings, data, make, argv, mgrit, epochs=4, lr=3e-3)


if __name__ == "__main__":
    start(main)
