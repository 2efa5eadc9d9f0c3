"""What a person does, from the motion of a telephone: 128 steps of 9 signals, 6 classes, by a GRU in parallel.

python -m problems.har_gru                                    # generated signals
python -m problems.har_gru -data_dir DATA
mpiexec -n 2 python -m problems.har_gru -kind classic
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.data import synthetic_har
from problems.shared.command_line import start
from problems.shared.files import DataFiles, choose
from problems.shared.layer_training import LayerTraining

#: Generated sequences for training: with fewer the epochs of the defaults are too few batches.
GENERATED = 4000


@dataclass(frozen=True)
class SequenceSettings(po.Settings):
    """The network and its sequences."""

    data: str = po.setting(
        "auto",
        "signals; auto: har with -data_dir or -fetch, else generated ones",
        choices=("auto", "synthetic_har", "har"),
    )
    hidden: int = po.setting(48, "hidden units of a GRU", at_least=1)
    gru_layers: int = po.setting(2, "GRUs that are stacked", at_least=1)
    kind: str = po.setting(
        "implicit", "update of a GRU: implicit in time, or the classic one", choices=("implicit", "classic")
    )


class Classifier(nn.Module):
    """Stacked GRUs and a closing layer on the last hidden state."""

    def __init__(self, settings: SequenceSettings, comm: Any, mgrit: nna.MgritSettings, data: nna.Dataset) -> None:
        super().__init__()
        _, steps, signals = data.x_train.shape
        self.gru = nna.GRUParallel(comm, signals, settings.hidden, steps, settings.gru_layers, settings.kind, mgrit)
        self.closing = nn.Linear(settings.hidden, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.closing(self.gru(x))  # type: ignore[no-any-return]


def standardized(data: nna.Dataset) -> nna.Dataset:
    """Signals with mean 0 and deviation 1 over the training samples: accelerations and rates are of unlike size."""
    mean, deviation = data.x_train.mean((0, 1)), data.x_train.std((0, 1)).clamp(min=1e-6)
    return replace(data, x_train=(data.x_train - mean) / deviation, x_test=(data.x_test - mean) / deviation)


def signals(own: SequenceSettings, files: DataFiles, seed: int) -> nna.Dataset:
    """The signals that the settings name, standardized."""
    name = choose(own.data, files, "har", "synthetic_har")
    if name == "synthetic_har":
        return standardized(files.generated(synthetic_har(GENERATED, seed=seed)))
    return standardized(files.load(name, seed))


SCRIPT = LayerTraining(
    "har_gru",
    __doc__,
    SequenceSettings,
    data=signals,
    make=Classifier,
    second_order=(),
    numbers=lambda own, batch: own.gru_layers * own.hidden * (3 * own.hidden + 128 * batch),
    defaults={nna.TrainingSettings: {"epochs": 3, "lr": 5e-3}, nna.MgritSettings: nna.layers.SEQUENCES},
)
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the weights run serially."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
