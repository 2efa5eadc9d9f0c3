"""Sets of videos in folders, CLASS/VIDEO, with the official splits of HMDB51 or every fifth video for tests.

Videos are of unlike length. Here they are sequences of one length with a mask: the last channel of a sample is 1 where
there is a frame, and 0 where the sequence is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nn_adapters.data.dataset import Dataset
from nn_adapters.data.limits import LIMIT_MB, regular_file
from nn_adapters.data.videos import MOVIE_ENDINGS, is_video, read_video, write_video
from pdeopt.core.errors import InputError
from pdeopt.core.memory import require_memory

#: What a line of HMDB51's split files says of a video: it is not used, for training, for tests.
PARTS = {"0": None, "1": False, "2": True}


@dataclass(frozen=True)
class VideoSet:
    """Videos that were found, not read.

    Attributes:
        root: of the folder.
        classes: their names, the folders, in order.
        paths: of the videos that are used.
        labels: of each, an index into `classes`.
        is_test: whether it is for tests.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    is_test: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.paths)


def find_videos(folder: str | Path, splits: str | Path = "", split: int = 1) -> VideoSet:
    """The videos of a folder, one folder a class.

    Args:
        folder: FOLDER/CLASS/VIDEO, where a video is a movie or a folder of frames.
        splits: folder of split files as HMDB51 has them, `CLASS_test_splitN.txt`, lines `VIDEO.avi P` with P = 1 for
            training, 2 for tests, 0 for neither. Videos are found by their name without ending, so that others than
            the .avi files will do. Without it the fifth of each five is for tests.
        split: N.

    Raises:
        InputError: fewer than two classes, a class without videos, a movie of another ending, none for training or
            tests, split files that are missing, that name videos which are not there, or that have other lines.

    Source of the splits: H. Kuehne, H. Jhuang, E. Garrote, T. Poggio, T. Serre, HMDB: a large video database for human
    motion recognition, ICCV 2011.
    """
    root = Path(folder)
    is_there = bool(str(folder)) and root.is_dir()
    classes = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".") if is_there else []
    if len(classes) < 2:
        raise InputError("folder of videos", folder, "a folder of at least two classes, CLASS/VIDEO")
    found: list[tuple[Path, int, bool]] = []
    for label, place in enumerate(classes):
        videos = sorted(path for path in place.iterdir() if is_video(path))
        if not videos:
            raise InputError(str(place), "a class without videos", "a video " + " | ".join(MOVIE_ENDINGS))
        parts = [i % 5 == 4 for i in range(len(videos))] if not splits else _by_split(place, videos, splits, split)
        found += [(video, label, part) for video, part in zip(videos, parts) if part is not None]
    if len({part for _, _, part in found}) < 2:
        legal = (
            "videos for training and for tests: at least five of a class, the fifth of which is for tests, or a split"
        )
        raise InputError("folder of videos", folder, legal)
    paths, labels, is_test = zip(*found)
    return VideoSet(root, tuple(place.name for place in classes), paths, labels, is_test)


def _by_split(place: Path, videos: list[Path], splits: str | Path, split: int) -> list[bool | None]:
    """Of each video of a class: for tests, for training, or None for neither."""
    table = read_split(Path(splits) / f"{place.name}_test_split{split}.txt")
    missing = sorted(set(table) - {video.stem for video in videos})
    if missing:
        legal = f"all videos of the split; {len(missing)} of {len(table)} are missing"
        raise InputError(str(place), f"no video {missing[0]}", legal)
    return [table.get(video.stem) for video in videos]


def read_split(path: Path) -> dict[str, bool | None]:
    """A split file of HMDB51: by the name of a video without its ending, whether it is for tests; None for unused.

    Args:
        path: of the file.

    Raises:
        InputError: no such file, or a line that is not of the format, which it names.
    """
    legal = "lines VIDEO.avi P, P = 0 | 1 | 2, each video once"
    if not regular_file(path):
        raise InputError(str(path), "no such file", legal)
    table: dict[str, bool | None] = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        name, _, part = line.strip().rpartition(" ")
        stem = name.strip().removesuffix(".avi")
        if line.strip() and (not stem or part not in PARTS or stem in table):
            raise InputError(f"{path}, line {number}", line[:80], legal)
        if line.strip():
            table[stem] = PARTS[part]
    if not table:
        raise InputError(str(path), "an empty file", legal)
    return table


def load_videos(videos: VideoSet, length: int, size: int, pick: str = "first", limit_mb: float = LIMIT_MB) -> Dataset:
    """All frames of a set, in memory.

    Args:
        videos: the set.
        length, size, pick, limit_mb: see `read_video`.

    Returns:
        Samples (n, length, channels + 1, size, size) in 0..1, the last channel is the mask; one channel of gray only
        where all videos have one.

    Raises:
        InputError: as `read_video`; more than fits into memory.
    """
    needed = 16.0 * len(videos) * length * size**2
    require_memory(needed, "videos", len(videos), "fewer, shorter or smaller ones, or features of an encoder")
    read = [read_video(path, length, size, pick, limit_mb) for path in videos.paths]
    channels = max(frames.shape[1] for frames in read)
    x = torch.stack([padded(frames.expand(-1, channels, -1, -1) / 255.0, length) for frames in read])
    y, is_test = torch.tensor(videos.labels), torch.tensor(videos.is_test)
    return Dataset(videos.root.name, x[~is_test], y[~is_test], x[is_test], y[is_test], len(videos.classes))


def padded(rows: Tensor, length: int) -> Tensor:
    """A sequence of this length with one more channel, the mask.

    Args:
        rows: at most `length` of them, (frames, channels, ...).
        length: of the sequence.

    Returns:
        (length, channels + 1, ...): zeros after the last row, the last channel 1 where there is one.
    """
    out = rows.new_zeros((length, rows.shape[1] + 1, *rows.shape[2:]))
    out[: len(rows), :-1], out[: len(rows), -1] = rows, 1.0
    return out


def write_video_set(data: Dataset, folder: str | Path, ending: str = ".mp4", rate: int = 10) -> Path:
    """Write a set of videos in memory, as `moving_shapes` makes it, as movies, with split files in FOLDER.splits.

    Args:
        data: samples (n, frames, channels, height, width) in 0..1, of one channel or three and even sides.
        folder: where CLASS/NUMBER.mp4 go.
        ending: of the movies.
        rate: frames a second.

    Returns:
        The folder of the split files; `find_videos(folder, splits)` finds the parts of `data` again.

    Raises:
        InputError: another ending, samples of another shape, or no package PyAV.
    """
    if ending not in MOVIE_ENDINGS:
        raise InputError("ending of movies", ending, " | ".join(MOVIE_ENDINGS))
    root, splits = Path(folder), Path(f"{folder}.splits")
    splits.mkdir(parents=True, exist_ok=True)
    lines: dict[int, list[str]] = {label: [] for label in range(data.classes)}
    for part, (x, y) in enumerate(((data.x_train, data.y_train), (data.x_test, data.y_test)), start=1):
        for number, (frames, label) in enumerate(zip(x, y.tolist())):
            place, name = root / f"class{label}", f"{'test' if part == 2 else 'train'}{number:05d}"
            place.mkdir(parents=True, exist_ok=True)
            write_video(place / (name + ending), (frames * 255).round().to(torch.uint8), rate)
            lines[label].append(f"{name}.avi {part}")
    for label, rows in lines.items():
        (splits / f"class{label}_test_split1.txt").write_text("\n".join(rows) + "\n")
    return splits
