"""How something moves, from a video: an encoder of single frames, evaluated once, and a GRU over their sequence.

python -m problems.video_gru                                  # generated: moving shapes
python -m problems.video_gru -frames DIR -epochs 10           # DIR/CLASS/VIDEO, movies or folders of frames
python -m problems.video_gru -frames DIR -splits DIR2 -encoder resnet18 -weights resnet18-f37072fd.pth -cache DIR3
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.data import FrozenEncoder, find_videos, load_videos, moving_shapes, store_features
from nn_adapters.data.videos import PICKS
from problems.shared.command_line import start
from problems.shared.files import DataFiles
from problems.shared.layer_training import LayerTraining


@dataclass(frozen=True)
class VideoSettings(po.Settings):
    """The network and its videos."""

    frames: str = po.setting(
        "", "folder CLASS/VIDEO of movies (.mp4, .avi, ...) or folders of frames; default generated moving shapes"
    )
    splits: str = po.setting("", "folder of HMDB51's split files; default: every fifth video is for tests")
    split: int = po.setting(1, "number of the split", at_least=1)
    length: int = po.setting(
        None,
        "frames of a video; longer ones are cut, shorter ones padded; default 128, generated 16",
        kind=int,
        at_least=2,
    )
    pick: str = po.setting("first", "frames of a longer video that are used", choices=PICKS)
    size: int = po.setting(
        None, "pixels of a frame's sides; default 16, with a pretrained encoder 224", kind=int, at_least=8
    )
    videos: int = po.setting(1200, "generated videos", at_least=10)
    encoder: str = po.setting(
        "", "architecture of torchvision, as resnet18, pretrained and frozen; default: a small one that is trained"
    )
    weights: str = po.setting("", "its file of weights, .pth or .safetensors")
    weights_sha256: str = po.setting("", "checksum of that file; default: the digits in its name, if it has some")
    cache: str = po.setting("", "folder that keeps the frames' features for later runs; default: for this run only")
    features: int = po.setting(32, "features of a frame, of the encoder that is trained", at_least=1)
    hidden: int = po.setting(64, "hidden units of a GRU", at_least=1)
    gru_layers: int = po.setting(1, "GRUs that are stacked", at_least=1)
    kind: str = po.setting(
        "implicit", "update of a GRU: implicit in time, or the classic one", choices=("implicit", "classic")
    )

    @property
    def steps(self) -> int:
        """Frames of a video."""
        return self.length or (128 if self.frames else 16)

    @property
    def pixels(self) -> int:
        """Of a frame's sides."""
        return self.size or (224 if self.encoder else 16)


class Classifier(nn.Module):
    """Encoder of frames, GRU, closing layer; a rank encodes the frames of its steps only.

    Samples are frames (batch, steps, channels + 1, height, width) or features of a frozen encoder (batch, steps,
    features + 1). The last channel is the mask.
    """

    def __init__(self, settings: VideoSettings, comm: Any, mgrit: nna.MgritSettings, data: nna.Dataset) -> None:
        super().__init__()
        _, length, channels, *sides = data.x_train.shape
        features = settings.features if sides else channels - 1
        self.encoder = _small_encoder(channels - 1, sides, features) if sides else nn.Identity()
        self.gru = nna.GRUParallel(comm, features, settings.hidden, length, settings.gru_layers, settings.kind, mgrit)
        for parameter in self.encoder.parameters():
            nna.sum_gradient_over_ranks(parameter, self.gru.grid.mpi)
        self.closing = nn.Linear(settings.hidden, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        own = x[:, self.gru.grid.begin : self.gru.grid.end].transpose(0, 1)
        rows = self.encoder(own[:, :, :-1].flatten(0, 1)).unflatten(0, own.shape[:2])
        mask = own[:, :, -1].flatten(2)[..., 0] if own.dim() > 3 else own[:, :, -1]
        return self.closing(self.gru.from_rows(rows, mask > 0.5))  # type: ignore[no-any-return]


def _small_encoder(channels: int, sides: Sequence[int], features: int) -> nn.Sequential:
    """Two convolutions and a dense layer, to be trained."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * -(-sides[0] // 4) * -(-sides[1] // 4), features),
        nn.ReLU(),
    )


def videos(folder: str, own: VideoSettings, files: DataFiles, seed: int) -> nna.Dataset:
    """The videos that the settings name, or the features of their frames; `folder` takes those that nobody keeps."""
    if files.data_dir or files.fetch:
        raise po.InputError("-data_dir, -fetch", "no set of videos to read", "-frames FOLDER with CLASS/VIDEO")
    if bool(own.encoder) != bool(own.weights) or (own.encoder and not own.frames):
        got = (
            f"-encoder {own.encoder or '(none)'}, -weights {own.weights or '(none)'}, -frames {own.frames or '(none)'}"
        )
        raise po.InputError("a pretrained encoder", got, "all three of them, or -frames alone, or none")
    if not own.frames:
        if own.splits or own.cache:
            raise po.InputError("-splits, -cache", "no -frames", "-frames FOLDER with CLASS/VIDEO")
        data = moving_shapes(own.videos, own.steps, own.pixels, seed)
        parts = {name: _with_mask(getattr(data, name)) for name in ("x_train", "x_test")}
        return replace(data, **parts)
    found = find_videos(own.frames, own.splits, own.split)
    words = {"length": own.steps, "size": own.pixels, "pick": own.pick, "limit_mb": files.data_limit}
    if not own.encoder:
        return load_videos(found, **words)
    encoder = FrozenEncoder(own.encoder, own.weights, own.weights_sha256)
    return store_features(found, encoder, folder=own.cache or folder, **words)


def _with_mask(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :, :1])], 2)


def _numbers(own: VideoSettings, batch: int) -> float:
    gru = own.hidden * (3 * own.hidden + own.steps * batch)
    if own.frames:  # how many there are shows when they are found
        return own.gru_layers * gru
    frame = own.features * own.pixels**2  # of the encoder's last layer
    return own.gru_layers * gru + frame + 2.0 * own.videos * own.steps * own.pixels**2


SCRIPT = LayerTraining(
    "video_gru",
    __doc__,
    VideoSettings,
    data=partial(videos, ""),
    control=None,
    make=Classifier,
    numbers=_numbers,
    second_order=(),
    defaults={nna.TrainingSettings: {"epochs": 40, "batch": 50, "lr": 3e-3}, nna.MgritSettings: nna.layers.SEQUENCES},
)
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the weights run serially."""
    with tempfile.TemporaryDirectory(prefix="video_gru") as folder:
        return replace(SCRIPT, data=partial(videos, folder)).run(argv)


if __name__ == "__main__":
    start(main)
