"""Pretrained encoders of images: architectures of torchvision with weights from a file that the user names.

Nothing is downloaded, and nothing is unpickled but tensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nn_adapters.data.formats import verify_checksum
from nn_adapters.data.limits import refusing, regular_file
from nn_adapters.data.videos import require_package
from pdeopt.core.errors import InputError

#: Means and deviations of the colors of ImageNet, which torchvision's weights were trained with.
COLOR_MEAN, COLOR_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: The first digits of the checksum, in the names of PyTorch's files of weights.
NAMED_SUM = re.compile(r"-([0-9a-f]{8})\.[a-z]+$")

#: Pictures that go through an encoder at once.
TOGETHER = 32


def architectures() -> Any:
    """The module `torchvision.models`.

    Builds of torchvision for CUDA do not find their compiled operators where PyTorch is a build for CPUs, and then do
    not even start. Classifiers need none of these operators: their schemas are enough.

    Raises:
        InputError: no package torchvision, or one that does not fit this PyTorch.
    """
    try:
        return require_package("torchvision.models", "video")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return require_package("torchvision.models", "video")
    except RuntimeError as error:
        legal = "the torchvision that belongs to it"
        raise InputError("package torchvision", f"one that does not fit PyTorch {torch.__version__}", legal) from error


class FrozenEncoder:
    """A pretrained network that maps images to features, as it is: not trained, without random numbers.

    Args:
        name: an architecture of torchvision that classifies images, as resnet18, resnet34, resnet50.
        weights: file of its weights: .pth, as torchvision's are, or .safetensors.
        sha256: its checksum, hexadecimal. Without it, a checksum in the file's name is compared, if there is one, as in
            resnet18-f37072fd.pth.

    Attributes:
        checksum: of the weights that were read.
        features: of an image: the scores of the architecture's classes.
        evaluated: images so far.

    Raises:
        InputError: another architecture, a file that is damaged or has another checksum, weights of another network or
            that are not finite, or a package that is missing.

    Example:
        >>> encoder = FrozenEncoder("resnet18", "resnet18-f37072fd.pth")
        >>> encoder(torch.zeros(2, 3, 224, 224, dtype=torch.uint8)).shape
        torch.Size([2, 1000])
    """

    def __init__(self, name: str, weights: str | Path, sha256: str = "") -> None:
        models, self.name = architectures(), name
        names = models.list_models(module=models)
        if name not in names:
            few = [each for each in names if each.startswith(("resnet", "squeezenet", "mobilenet"))]
            raise InputError("encoder", name, " | ".join(few) + ", or another classifier of torchvision")
        table, self.checksum = read_weights(Path(weights), sha256)
        with torch.random.fork_rng(devices=[]):  # the first weights do not count
            self.network: nn.Module = models.get_model(name, weights=None)
        _take(self.network, table, f"{weights}: weights of {name}")
        self.network.eval().requires_grad_(False)
        self.features, self.evaluated = int(self._scores(torch.zeros(1, 3, 64, 64)).shape[1]), 0

    def __call__(self, images: Tensor) -> Tensor:
        """Features (images, features) of images, uint8, (images, 1 or 3 channels, height, width)."""
        self.evaluated += len(images)
        mean, deviation = (torch.tensor(each)[:, None, None] for each in (COLOR_MEAN, COLOR_DEVIATION))
        return torch.cat([self._scores((part / 255.0 - mean) / deviation) for part in images.split(TOGETHER)])

    @torch.no_grad()
    def _scores(self, images: Tensor) -> Tensor:
        return self.network(images)  # type: ignore[no-any-return]


def read_weights(path: Path, sha256: str = "") -> tuple[dict[str, Tensor], str]:
    """The tensors of a file of weights by their names, and the file's checksum.

    Args:
        path: .pth or .pt, a dictionary of tensors that PyTorch has saved, or .safetensors.
        sha256: see `FrozenEncoder`.

    Raises:
        InputError: a file that is missing, damaged, of another format, or with another checksum.
    """
    legal = "a .pth or .safetensors file of tensors by name"
    if not regular_file(path):
        raise InputError(str(path), "no such file", legal)
    named = NAMED_SUM.search(path.name)
    found = verify_checksum(path, sha256.lower() or (named[1] if named else ""))

    def read() -> dict[str, Tensor]:
        if path.suffix == ".safetensors":
            return load_file(path)
        table = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in table.items()):
            raise TypeError("other things than tensors by name")
        return dict(table)

    return refusing(path, legal, read), found


def _take(network: nn.Module, table: dict[str, Tensor], what: str) -> None:
    """Load weights, or name the first that does not fit."""
    own = network.state_dict()
    for name in sorted(own.keys() | table.keys()):
        if name.endswith("num_batches_tracked"):
            continue
        if name not in own or name not in table or own[name].shape != table[name].shape:
            shapes = [tuple(each[name].shape) if name in each else "nothing" for each in (table, own)]
            raise InputError(what, f"{name} of shape {shapes[0]}", f"{shapes[1]}")
        if not bool(table[name].isfinite().all()):
            raise InputError(what, f"{name} with numbers that are not finite", "finite numbers")
    network.load_state_dict(table, strict=False)
