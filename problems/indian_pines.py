"""What grows on a pixel, from the spectrum that it reflects: 16 classes, 200 to 220 bands.

python -m problems.indian_pines                        # generated spectra
python -m problems.indian_pines -data indian_pines -data_dir DATA
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nn_adapters.data.dataset import Dataset
from nn_adapters.data.datasets import load_dataset
from nn_adapters.layers.blocks import dense
from nn_adapters.layers.layerparallel import LayerParallel
from pdeopt.core.settings import Settings, setting
from pdeopt.steps.mgrit import MgritSettings
from problems.shared import layer_training as training
from problems.shared.case import start


@dataclass(frozen=True)
class SpectraSettings(Settings):
    """The network and its spectra; its width is the number of bands."""

    data: str = setting("indian_pines_like", "data set", choices=("indian_pines_like", "indian_pines"))
    layers: int = setting(32, "layers", at_least=1)
    Tf: float = setting(2.0, "time of the layers", above=0)
    initial: float = setting(1e-2, "factor of the layers' first weights", at_least=0)


class Classifier(nn.Module):
    """Layers as wide as the spectrum, and a closing layer."""

    def __init__(self, data: Dataset, settings: SpectraSettings, comm: Any, mgrit: MgritSettings) -> None:
        super().__init__()
        width = data.x_train.shape[1]
        self.layers = LayerParallel(comm, lambda: dense(width), settings.layers, settings.Tf, mgrit)
        self.layers.scale(settings.initial)
        self.closing = nn.Linear(width, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.closing(self.layers(x))  # type: ignore[no-any-return]


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the weights run serially."""

    def data(own: SpectraSettings, output: training.OutputSettings, seed: int) -> Dataset:
        return load_dataset(own.data, output.data_dir, output.fetch, seed)

    def make(settings: SpectraSettings, comm: Any, mgrit: MgritSettings, data: Dataset) -> nn.Module:
        return Classifier(data, settings, comm, mgrit)

    mgrit = MgritSettings(coarsening="4")
    return training.main("indian_pines", __doc__ or "", SpectraSettings, data, make, argv, mgrit, epochs=10)


if __name__ == "__main__":
    start(main)
