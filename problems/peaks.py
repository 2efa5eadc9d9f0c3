"""The Peaks problem: which of five levels of MATLAB's peaks function a point of the plane is on.

python -m problems.peaks -layers 1024 -epochs 50
mpiexec -n 2 python -m problems.peaks -layers 1024 -summary peaks.json
python -m problems.peaks -layer_mgrit_levels 1    # one layer after the other
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nn_adapters.data.dataset import Dataset
from nn_adapters.data.generated import peaks
from nn_adapters.layers.blocks import ACTIVATIONS, activation, dense
from nn_adapters.layers.layerparallel import LayerParallel
from pdeopt.core.settings import Settings, setting
from pdeopt.steps.mgrit import MgritSettings
from problems.shared import layer_training as training
from problems.shared.case import start


@dataclass(frozen=True)
class PeaksSettings(Settings):
    """The network."""

    layers: int = setting(256, "layers", at_least=1)
    width: int = setting(8, "channels", at_least=1)
    Tf: float = setting(5.0, "time of the layers", above=0)
    initial: float = setting(
        1e-2, "factor of the layers' first weights: small ones are smooth from layer to layer", at_least=0
    )
    activation: str = setting("tanh", "activation", choices=tuple(ACTIVATIONS))


class Classifier(nn.Module):
    """Opening layer, layers of one width, closing layer."""

    def __init__(self, features: int, classes: int, settings: Any, comm: Any, mgrit: MgritSettings) -> None:
        super().__init__()
        self.opening = nn.Sequential(nn.Linear(features, settings.width), activation(settings.activation))
        self.layers = LayerParallel(
            comm, lambda: dense(settings.width, settings.activation), settings.layers, settings.Tf, mgrit
        )
        self.layers.scale(settings.initial)
        self.closing = nn.Linear(settings.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.closing(self.layers(self.opening(x)))  # type: ignore[no-any-return]


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the weights run serially."""

    def make(settings: PeaksSettings, comm: Any, mgrit: MgritSettings, data: Dataset) -> nn.Module:
        return Classifier(2, data.classes, settings, comm, mgrit)

    return training.main(
        "peaks",
        __doc__,
        PeaksSettings,
        lambda own, output, seed: peaks(seed),
        make,
        argv,
        epochs=60,
        batch=500,
        lr=1e-2,
    )


if __name__ == "__main__":
    start(main)
