"""The Peaks problem: which of five levels of MATLAB's peaks function a point of the plane is on.

python -m problems.peaks -layers 1024 -epochs 50
mpiexec -n 2 python -m problems.peaks -layers 1024 -summary peaks.json
python -m problems.peaks -layer_mgrit_levels 1    # one layer after the other
python -m problems.peaks -spline_points 32    # weights that are splines in depth: an eighth of the parameters
python -m problems.peaks -solver sqp -layers 16 -samples 500 -max_cpu_seconds 5    # as a control problem
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.data import peaks
from problems.shared.command_line import start
from problems.shared.layer_training import LayerTraining
from problems.shared.sqp_training import AsControl


@dataclass(frozen=True)
class PeaksSettings(po.Settings):
    """The network."""

    layers: int = po.setting(256, "layers of the network", at_least=1)
    width: int = po.setting(8, "channels of a layer", at_least=1)
    Tf: float = po.setting(5.0, "time of the layers", above=0)
    initial: float = po.setting(
        1e-2, "factor of the layers' first weights: small ones are smooth from layer to layer", at_least=0
    )
    activation: str = po.setting("tanh", "activation of the layers", choices=tuple(nna.ACTIVATIONS))
    spline_points: int = po.setting(
        0, "coefficients of weights that are splines in depth; 0 for a weight of its own for each layer", at_least=0
    )
    spline_degree: int = po.setting(1, "degree of the splines", at_least=0, at_most=3)


class Classifier(nn.Module):
    """Opening layer, layers of one width, closing layer."""

    def __init__(self, settings: PeaksSettings, comm: Any, mgrit: nna.MgritSettings, data: nna.Dataset) -> None:
        super().__init__()
        features = data.x_train.shape[1]
        self.opening = nn.Sequential(nn.Linear(features, settings.width), nna.activation(settings.activation))
        self.layers = nna.LayerParallel(
            comm, lambda: nna.dense(settings.width, settings.activation), settings.layers, settings.Tf, mgrit
        )
        self.layers.scale(settings.initial)
        if settings.spline_points:
            self.layers.use_splines(settings.spline_degree, settings.spline_points)
        self.closing = nn.Linear(settings.width, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.closing(self.layers(self.opening(x)))  # type: ignore[no-any-return]


def parts(network: Classifier) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Opening, layers and head, as of a control problem, whose controls are the weights of each layer."""
    if nna.layers.spline_coefficients(network):
        raise po.InputError("-spline_points", "splines with -solver sqp", "0, or epochs")
    return network.opening, network.layers, network.closing


#: Options and defaults.
SCRIPT = LayerTraining(
    "peaks",
    __doc__,
    PeaksSettings,
    data=lambda own, files, seed: files.load("peaks", seed),
    make=Classifier,
    control=AsControl(
        data=lambda own, files, seed: files.generated(peaks(seed, test=798)),
        defaults={"initial": 1.0, "layers": 16},
        parts=parts,
    ),
    numbers=lambda own, batch: own.layers * own.width * (own.width + batch),
    defaults={nna.TrainingSettings: {"epochs": 60, "batch": 200, "lr": 2e-2}},
)
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the weights run serially."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
