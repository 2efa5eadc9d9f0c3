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

import nn_adapters as nna
import pdeopt as po
from nn_adapters.data import moving_shapes
from nn_adapters.data.limits import LIMIT_MB, Allowance, regular_file
from problems.shared.command_line import start
from problems.shared.files import DataFiles
from problems.shared.layer_training import LayerTraining


@dataclass(frozen=True)
class VideoSettings(po.Settings):
    """The network and its videos."""

    frames: str = po.setting("", "folder CLASS/VIDEO/frame files; default generated moving shapes")
    length: int = po.setting(16, "frames of a video that are used, evenly spaced", at_least=2)
    size: int = po.setting(16, "pixels of a frame's sides", at_least=8)
    videos: int = po.setting(600, "generated videos", at_least=10)
    features: int = po.setting(32, "features of a frame", at_least=1)
    hidden: int = po.setting(64, "hidden units of a GRU", at_least=1)
    gru_layers: int = po.setting(1, "GRUs that are stacked", at_least=1)
    kind: str = po.setting(
        "implicit", "update of a GRU: implicit in time, or the classic one", choices=("implicit", "classic")
    )


class Classifier(nn.Module):
    """Encoder of frames, GRU, closing layer; a rank encodes the frames of its steps only."""

    def __init__(self, settings: VideoSettings, comm: Any, mgrit: nna.MgritSettings, data: nna.Dataset) -> None:
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
        self.gru = nna.GRUParallel(
            comm, settings.features, settings.hidden, length, settings.gru_layers, settings.kind, mgrit
        )
        for parameter in self.encoder.parameters():
            nna.sum_gradient_over_ranks(parameter, self.gru.grid.mpi)
        self.closing = nn.Linear(settings.hidden, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        own = x[:, self.gru.grid.begin : self.gru.grid.end].transpose(0, 1)
        rows = self.encoder(own.flatten(0, 1)).unflatten(0, own.shape[:2])
        return self.closing(self.gru.from_rows(rows))  # type: ignore[no-any-return]


def read_image(file: Path, limit_mb: float = LIMIT_MB) -> Tensor:
    """An image file as (channels, height, width) in 0..1: 1 channel or 3.

    Args:
        file: PNG or JPEG.
        limit_mb: megabytes that it may expand to; see `nn_adapters.data.limits`.

    Raises:
        InputError: a file that is damaged, of another format, or too large.
    """
    from matplotlib.image import imread
    from PIL import Image

    legal = "a .png or .jpg file"
    if not regular_file(file):
        raise po.InputError(str(file), "no such file", legal)
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:  # reads the header alone
            Allowance(file, limit_mb).check(16 * image.width * image.height)
        pixels = torch.as_tensor(imread(file).copy(), dtype=torch.float32)
    except po.InputError:
        raise
    except Exception as error:  # a damaged image fails in any way
        raise po.InputError(str(file), f"damaged or of another format ({type(error).__name__})", legal) from None
    pixels = (pixels if pixels.dim() == 3 else pixels[..., None])[..., :3].permute(2, 0, 1)
    return pixels / 255.0 if float(pixels.max()) > 1 else pixels


def read_frames(folder: str, length: int, size: int, seed: int, limit_mb: float = LIMIT_MB) -> nna.Dataset:
    """Videos as folders of image files, one folder a class; every fifth video of a class is for testing."""
    classes = sorted(path for path in Path(folder).iterdir() if path.is_dir()) if Path(folder).is_dir() else []
    if len(classes) < 2:
        raise po.InputError("-frames", folder, "a folder of at least two classes, CLASS/VIDEO/frames")
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    channels: set[int] = set()
    for label, place in enumerate(classes):
        for number, video in enumerate(sorted(path for path in place.iterdir() if path.is_dir())):
            files = sorted(path for path in video.iterdir() if path.suffix in (".png", ".jpg", ".jpeg"))
            if not files:
                raise po.InputError("-frames", f"{video}, which has no frames", ".png or .jpg files")
            picked = [files[i * len(files) // length] for i in range(length)]
            images = [nn.functional.interpolate(read_image(f, limit_mb)[None], (size, size))[0] for f in picked]
            if len(channels := channels | {len(image) for image in images}) > 1:
                raise po.InputError("-frames", f"{video} with {sorted(channels)} channels", "one number in all videos")
            part = int(number % 5 == 4)
            parts[part].append(torch.stack(images))
            labels[part].append(label)
    if not parts[1]:
        raise po.InputError("-frames", folder, "at least five videos of a class: the fifth of each is for testing")
    x, y = [torch.stack(part) for part in parts], [torch.tensor(part) for part in labels]
    return nna.Dataset(Path(folder).name, x[0], y[0], x[1], y[1], len(classes))


def videos(own: VideoSettings, files: DataFiles, seed: int) -> nna.Dataset:
    """The videos that the settings name."""
    if own.frames:
        return read_frames(own.frames, own.length, own.size, seed, files.data_limit)
    if files.data_dir or files.fetch:
        raise po.InputError("-data_dir, -fetch", "no set of videos to read", "-frames FOLDER with CLASS/VIDEO/*.png")
    return moving_shapes(own.videos, own.length, own.size, seed)


def _numbers(own: VideoSettings, batch: int) -> float:
    gru = own.hidden * (3 * own.hidden + own.length * batch)
    frame = own.features * own.size**2  # of the encoder's last layer
    return own.gru_layers * gru + frame + own.videos * own.length * own.size**2


SCRIPT = LayerTraining(
    "video_gru",
    __doc__,
    VideoSettings,
    data=videos,
    make=Classifier,
    numbers=_numbers,
    second_order=(),
    defaults={
        nna.TrainingSettings: {"epochs": 12, "batch": 50},
        nna.MgritSettings: {"coarsening": "4", "cycles": 2, "relaxation": "FCF"},
    },
)
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the weights run serially."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
