"""How something moves, from a video: an encoder of single frames, evaluated once, and a GRU over their sequence.

python -m problems.video_gru                                  # generated: moving shapes
python -m problems.video_gru -frames DIR -epochs 10           # DIR/CLASS/VIDEO/*.png, as HMDB51 is unpacked
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.data.dataset import Dataset
from nn_adapters.data.generated import moving_shapes
from nn_adapters.layers.recurrent import GRUParallel, sum_gradient_over_ranks
from pdeopt.core.errors import InputError
from pdeopt.core.settings import Settings, setting
from pdeopt.steps.mgrit import MgritSettings
from problems.shared import layer_training as training
from problems.shared.case import start


@dataclass(frozen=True)
class VideoSettings(Settings):
    """The network and its videos."""

    frames: str = setting("", "folder CLASS/VIDEO/frame files; default generated moving shapes")
    length: int = setting(16, "frames of a video that are used, evenly spaced", at_least=2)
    size: int = setting(16, "pixels of a frame's sides", at_least=8)
    videos: int = setting(600, "generated videos", at_least=10)
    features: int = setting(32, "features of a frame", at_least=1)
    hidden: int = setting(64, "hidden units", at_least=1)
    gru_layers: int = setting(1, "stacked units", at_least=1)
    kind: str = setting("implicit", "unit", choices=("implicit", "classic"))


class Classifier(nn.Module):
    """Encoder of frames, GRU, closing layer; a rank encodes the frames of its steps only."""

    def __init__(self, data: Dataset, settings: VideoSettings, comm: Any, mgrit: MgritSettings) -> None:
        super().__init__()
        _, length, channels, height, width = data.x_train.shape
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, 8, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * -(-height // 4) * -(-width // 4), settings.features),
            nn.ReLU(),
        )
        self.gru = GRUParallel(
            comm, settings.features, settings.hidden, length, settings.gru_layers, settings.kind, mgrit
        )
        for parameter in self.encoder.parameters():
            sum_gradient_over_ranks(parameter, self.gru.grid.mpi)
        self.closing = nn.Linear(settings.hidden, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        own = x[:, self.gru.grid.begin : self.gru.grid.end].transpose(0, 1)
        rows = self.encoder(own.flatten(0, 1)).unflatten(0, own.shape[:2])
        return self.closing(self.gru.from_rows(rows))  # type: ignore[no-any-return]


def read_frames(folder: str, length: int, size: int, seed: int) -> Dataset:
    """Videos as folders of image files, one folder a class; every fifth video of a class is for testing."""
    from matplotlib.image import imread

    classes = sorted(path for path in Path(folder).iterdir() if path.is_dir()) if Path(folder).is_dir() else []
    if len(classes) < 2:
        raise InputError("-frames", folder, "a folder of at least two classes, CLASS/VIDEO/frames")
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    for label, place in enumerate(classes):
        for number, video in enumerate(sorted(path for path in place.iterdir() if path.is_dir())):
            files = sorted(path for path in video.iterdir() if path.suffix in (".png", ".jpg", ".jpeg"))
            if not files:
                raise InputError("-frames", f"{video}, which has no frames", ".png or .jpg files")
            picked = [files[i * len(files) // length] for i in range(length)]
            images = [torch.as_tensor(imread(file).copy(), dtype=torch.float32) for file in picked]
            images = [(im if im.dim() == 3 else im[..., None])[..., :3].permute(2, 0, 1) for im in images]
            images = [im / 255.0 if float(im.max()) > 1 else im for im in images]
            video_tensor = torch.stack([nn.functional.interpolate(im[None], (size, size))[0] for im in images])
            part = int(number % 5 == 4)
            parts[part].append(video_tensor)
            labels[part].append(label)
    if not parts[1]:
        raise InputError("-frames", folder, "at least five videos of a class: the fifth of each is for testing")
    x, y = [torch.stack(part) for part in parts], [torch.tensor(part) for part in labels]
    return Dataset(Path(folder).name, x[0], y[0], x[1], y[1], len(classes))


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the weights run serially."""

    def data(own: VideoSettings, output: training.OutputSettings, seed: int) -> Dataset:
        if own.frames:
            return read_frames(own.frames, own.length, own.size, seed)
        return moving_shapes(own.videos, own.length, own.size, seed)

    def make(settings: VideoSettings, comm: Any, mgrit: MgritSettings, data: Dataset) -> nn.Module:
        return Classifier(data, settings, comm, mgrit)

    mgrit = MgritSettings(coarsening="4", levels=2, cycles=2, relaxation="FCF")
    return training.main("video_gru", __doc__ or "", VideoSettings, data, make, argv, mgrit, epochs=12, batch=50)


if __name__ == "__main__":
    start(main)
