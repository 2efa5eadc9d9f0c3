"""What grows on a pixel, from the spectrum that it reflects: 16 classes, 200 to 220 bands.

python -m problems.indian_pines                        # generated spectra
python -m problems.indian_pines -data_dir DATA
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from problems.shared.command_line import start
from problems.shared.files import DataFiles, choose
from problems.shared.layer_training import LayerTraining


@dataclass(frozen=True)
class SpectraSettings(po.Settings):
    """The network and its spectra; its width is the number of bands."""

    data: str = po.setting(
        "auto",
        "spectra; auto: indian_pines with -data_dir or -fetch, else generated ones",
        choices=("auto", "indian_pines_like", "indian_pines"),
    )
    layers: int = po.setting(32, "layers of the network", at_least=1)
    Tf: float = po.setting(2.0, "time of the layers", above=0)
    initial: float = po.setting(1e-2, "factor of the layers' first weights", at_least=0)


class Classifier(nn.Module):
    """Layers as wide as the spectrum, and a closing layer."""

    def __init__(self, settings: SpectraSettings, comm: Any, mgrit: nna.MgritSettings, data: nna.Dataset) -> None:
        super().__init__()
        width = data.x_train.shape[1]
        self.layers = nna.LayerParallel(comm, lambda: nna.dense(width), settings.layers, settings.Tf, mgrit)
        self.layers.scale(settings.initial)
        self.closing = nn.Linear(width, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.closing(self.layers(x))  # type: ignore[no-any-return]


def spectra(own: SpectraSettings, files: DataFiles, seed: int) -> nna.Dataset:
    """The spectra that the settings name."""
    name = choose(own.data, files, "indian_pines", "indian_pines_like")
    return files.load(name, seed)


SCRIPT = LayerTraining(
    "indian_pines",
    __doc__,
    SpectraSettings,
    data=spectra,
    make=Classifier,
    numbers=lambda own, batch: own.layers * 20 * (20 + batch),
    defaults={nna.TrainingSettings: {"epochs": 10}, nna.MgritSettings: {"coarsening": "4", "adjoint_cycles": 1}},
)
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the weights run serially."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
