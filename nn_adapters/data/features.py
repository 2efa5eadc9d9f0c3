"""Features of the frames of videos, computed once, kept in a file, and read as they are needed.

The file is of the format safetensors. It is laid out before the first video is read and filled video by video, so that
neither writing nor reading needs room for all features at once: tensors that are read share their memory with the file,
of which the system loads what is looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors import safe_open

from nn_adapters.data.dataset import Dataset
from nn_adapters.data.encoders import FrozenEncoder
from nn_adapters.data.limits import LIMIT_MB, refusing, regular_file
from nn_adapters.data.videos import read_video
from nn_adapters.data.videosets import VideoSet, padded
from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError

FORMAT = "pdeopt features 1"

#: Stands for a checksum until it is known.
NO_SUM = "0" * 64

LEGAL = "a file of features as store_features writes it; remove it, and it is made anew"


@dataclass(frozen=True, eq=False)
class StoredDataset(Dataset):
    """A data set whose samples are in a file; sent to another process of the machine, it is opened there.

    Attributes:
        file: of the samples.
    """

    file: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return open_features, (self.file, False, self.costs)


def features_name(videos: VideoSet, encoder: FrozenEncoder, length: int, size: int, pick: str) -> str:
    """The name of a file of features, which tells by its digits all that they depend on.

    Videos count by their names, sizes and times of change: those of the frames, where a video is a folder.

    Args:
        videos, encoder: of the features.
        length, size, pick: see `read_video`.
    """
    stamps = [
        (path.relative_to(videos.root).as_posix(), label, part, _stamp(path))
        for path, label, part in zip(videos.paths, videos.labels, videos.is_test)
    ]
    what = [FORMAT, encoder.name, encoder.checksum, length, size, pick, videos.classes, stamps]
    digits = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    return f"{videos.root.name}-{encoder.name}-{digits}.safetensors"


def _stamp(path: Path) -> list[Any]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def store_features(
    videos: VideoSet,
    encoder: FrozenEncoder,
    length: int,
    size: int,
    pick: str = "first",
    folder: str | Path = ".",
    limit_mb: float = LIMIT_MB,
    observe: Callable[[int, int], None] = lambda done, whole: None,
) -> StoredDataset:
    """The features of all frames, each evaluated once: read from the file that has them, or else computed into it.

    Args:
        videos, encoder: of the features.
        length, size, pick, limit_mb: see `read_video`.
        folder: of the file, `features_name`.
        observe: called after each video that was encoded, with their number so far and in all.

    Returns:
        Samples (n, length, features + 1), the last one the mask; `costs` tells the frames that were encoded, and the
        seconds for reading and encoding them. Samples of the file are compared with a checksum.

    Raises:
        InputError: as `read_video`; a file of features that is damaged.
        OSError: no place to write to.
    """
    path = Path(folder) / features_name(videos, encoder, length, size, pick)
    if path.exists():
        return open_features(str(path), verify=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    costs = {"frames": 0.0, "disk": 0.0, "encoder": 0.0}
    layout = _Layout(videos, length, encoder.features + 1)
    part = path.with_suffix(".part")
    try:
        rows = layout.create(part)
        for done, (at, video) in enumerate(zip(layout.places(videos), videos.paths), start=1):
            begin = time.perf_counter()
            frames = read_video(video, length, size, pick, limit_mb)
            middle = time.perf_counter()
            rows[at] = padded(encoder(frames.expand(-1, 3, -1, -1)), length).numpy()
            costs["frames"] += len(frames)
            costs["disk"] += middle - begin
            costs["encoder"] += time.perf_counter() - middle
            observe(done, len(videos))
        layout.finish(part, rows)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return open_features(str(path), costs=costs)


class _Layout:
    """Where things are in a file of features: training samples, test samples, then their classes."""

    def __init__(self, videos: VideoSet, length: int, width: int) -> None:
        is_test = np.array(videos.is_test)
        labels = np.array(videos.labels, dtype=np.int64)
        self.labels = np.concatenate([labels[~is_test], labels[is_test]])
        self.shape = (len(videos), length, width)
        n, bytes_each = int((~is_test).sum()), 4 * length * width
        ends = [0, n * bytes_each, len(videos) * bytes_each]
        ends += [ends[2] + 8 * n, ends[2] + 8 * len(videos)]
        counts = [n, len(videos) - n]
        self.table = {
            name: {"dtype": kind, "shape": shape, "data_offsets": ends[i : i + 2]}
            for i, (name, kind, shape) in enumerate(
                [
                    *((f"x_{part}", "F32", [k, length, width]) for part, k in zip(("train", "test"), counts)),
                    *((f"y_{part}", "I64", [k]) for part, k in zip(("train", "test"), counts)),
                ]
            )
        }
        self.words = {"format": FORMAT, "name": videos.root.name, "classes": str(len(videos.classes))}

    @staticmethod
    def places(videos: VideoSet) -> list[int]:
        """The row of each video."""
        order = np.argsort(videos.is_test, kind="stable")
        return list(np.argsort(order, kind="stable"))

    def header(self, sha256: str) -> bytes:
        """The header, whatever the checksum of the same length."""
        words = {**self.words, "sha256": sha256}
        plain = json.dumps({"__metadata__": words, **self.table}).encode()
        plain += b" " * (-len(plain) % 8)
        return len(plain).to_bytes(8, "little") + plain

    def create(self, path: Path) -> Array:
        """Make the file with its header and classes; the samples, to be filled, as an array that is the file."""
        header = self.header(NO_SUM)
        with path.open("wb") as file:
            file.write(header)
            file.seek(len(header) + 4 * int(np.prod(self.shape)))
            file.write(self.labels.tobytes())
        return np.memmap(path, np.float32, "r+", len(header), self.shape)

    def finish(self, path: Path, rows: Any) -> None:
        """Write the checksum; all is on the disk then."""
        rows.flush()
        header = self.header(_sum_after_header(path))
        with path.open("r+b") as file:
            file.write(header)
            os.fsync(file.fileno())


def _sum_after_header(path: Path) -> str:
    """The checksum of all numbers of a file of the format safetensors."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_features(file: str, verify: bool = False, costs: Mapping[str, float] = MappingProxyType({})) -> StoredDataset:
    """A data set of features in a file, whose samples share their memory with it.

    Args:
        file: that `store_features` has written.
        verify: whether all numbers are read and compared with their checksum.
        costs: of the set.

    Raises:
        InputError: a file that is missing, damaged or of another format.
    """
    if not regular_file(file):
        raise InputError(file, "no such file", LEGAL)

    def read() -> StoredDataset:
        with safe_open(file, "pt") as stored:  # type: ignore[no-untyped-call]
            words = stored.metadata()
            samples = [stored.get_tensor(name) for name in ("x_train", "y_train", "x_test", "y_test")]
        if words["format"] != FORMAT:
            raise ValueError("another format")
        if verify and _sum_after_header(Path(file)) != words["sha256"]:
            raise ValueError("a checksum that is not that of its numbers")
        return StoredDataset(words["name"], *samples, int(words["classes"]), dict(costs), file)

    return refusing(file, LEGAL, read)
