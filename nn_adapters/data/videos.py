"""Single videos, read and written: movies, by PyAV, or folders of images, by Pillow.

Nothing of a file is believed before it is compared with what it may expand to (`data.limits`), and no file can make the
reader open another one. A video that is damaged, that ends before the frames that its header states, or that has no
frames raises `InputError`, which names it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from nn_adapters.data.limits import LIMIT_MB, Allowance, refusing, regular_file
from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError

#: Endings of movies, and FFmpeg's names of their containers; playlists, which name other files, are none.
MOVIE_ENDINGS = (".mp4", ".avi", ".mkv", ".mov", ".webm")
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm"

#: Endings of movies in other containers, which are not passed over in silence.
OTHER_MOVIES = (".mpg", ".mpeg", ".m4v", ".wmv", ".flv", ".3gp", ".ts", ".ogv", ".gif")

#: Endings of the frames in a folder.
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")

#: Which frames of a video that has too many are used: the first ones, or as many evenly spaced.
PICKS = ("first", "spaced")


def require_package(name: str, extra: str) -> Any:
    """A package of an optional extra.

    Args:
        name: by which it is imported.
        extra: of pdeopt, which brings it.

    Raises:
        InputError: it is not installed; the message names the extra.
    """
    try:
        return import_module(name)
    except ImportError:
        raise InputError(f"package {name}", "none", f"pip install 'pdeopt[{extra}]'") from None


def is_video(path: Path) -> bool:
    """Whether this may be a video: a folder, or a file with the ending of a movie; hidden ones are none.

    Raises:
        InputError: a movie of another ending.
    """
    ending = path.suffix.lower()
    if path.name.startswith("."):
        return False
    if ending in OTHER_MOVIES and not path.is_dir():
        raise InputError(
            str(path), f"a movie {ending}", "a video " + " | ".join(MOVIE_ENDINGS) + " or a folder of frames"
        )
    return path.is_dir() or ending in MOVIE_ENDINGS


def read_video(path: Path, length: int, size: int, pick: str = "first", limit_mb: float = LIMIT_MB) -> Tensor:
    """The frames of a video, at most `length` of them, scaled to squares.

    Args:
        path: a movie of `MOVIE_ENDINGS`, or a folder of images, whose names are in the order of the frames: by the
            numbers in them.
        length: frames at most; of a longer video some are picked, a shorter one has fewer.
        size: pixels of the sides that frames are scaled to.
        pick: "first", after which reading stops, or "spaced", evenly over the whole video.
        limit_mb: megabytes that a file may expand to, and the frames in this size; see `data.limits`.

    Returns:
        uint8, (frames, channels, size, size): three channels, RGB, or one where all images of a folder are gray.

    Raises:
        InputError: a file that is damaged, of another format or too large, no frames, or a package that is missing.
    """
    frames = (_images if path.is_dir() else _movie)(path, length, size, pick, limit_mb)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.stack(frames), 3, 1)))


def _picked(count: int, length: int, pick: str) -> list[int]:
    """Numbers of the frames that are used."""
    if count <= length or pick == "first":
        return list(range(min(count, length)))
    return [i * count // length for i in range(length)]


# -- folders of images -------------------------------------------------------------------------------------


def _images(folder: Path, length: int, size: int, pick: str, limit_mb: float) -> list[Array]:
    found = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS and path.name[0] != ".")
    files = sorted(found, key=_in_order)
    if not files:
        raise InputError(str(folder), "a folder without frames", "files " + " | ".join(IMAGE_ENDINGS))
    images = [read_image(files[i], size, limit_mb) for i in _picked(len(files), length, pick)]
    is_gray = all(image.shape[2] == 1 for image in images)
    return images if is_gray else [np.broadcast_to(image, (size, size, 3)) for image in images]


def _in_order(path: Path) -> list[Any]:
    """A key for names that count: 2.png comes before 10.png."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)] + [path.name]


def read_image(path: Path, size: int, limit_mb: float = LIMIT_MB) -> Array:
    """An image, scaled to a square: uint8, (size, size, 1) if it is gray, else (size, size, 3).

    Args:
        path: PNG or JPEG.
        size: pixels of the sides.
        limit_mb: megabytes that it may expand to; see `data.limits`.

    Raises:
        InputError: a file that is damaged, of another format, or too large; no package Pillow.
    """
    pillow, legal = require_package("PIL.Image", "video"), "a .png or .jpg file"
    if not regular_file(path):
        raise InputError(str(path), "no such file", legal)

    def read() -> Array:
        with pillow.open(path, formats=("PNG", "JPEG")) as image:  # reads the header alone
            Allowance(path, limit_mb).check(16 * image.width * image.height)
            if image.mode.startswith(("I", "F")):  # gray of 16 bits
                image = pillow.fromarray((np.asarray(image).astype(float) / 256).clip(0, 255).astype(np.uint8))
            plain = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            pixels = np.asarray(plain.resize((size, size), pillow.Resampling.BILINEAR))
        return pixels if pixels.ndim == 3 else pixels[..., None]

    return refusing(path, legal, read)


# -- movies ------------------------------------------------------------------------------------------------


def _movie(path: Path, length: int, size: int, pick: str, limit_mb: float) -> list[Array]:
    av, legal = require_package("av", "video"), "a video " + " | ".join(MOVIE_ENDINGS)
    if not regular_file(path):
        raise InputError(str(path), "no such file", legal)
    allowed = Allowance(path, limit_mb)

    def read() -> list[Array]:
        _require_whole_segment(path)
        whitelist = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        with av.open(str(path), container_options=whitelist) as container:
            if not container.streams.video:
                raise ValueError("no pictures in it")
            stop = length if pick == "first" else None
            return list(_decoded(container, container.streams.video[0], size, stop, allowed))

    frames: list[Array] = refusing(path, legal, read)
    return [frames[i] for i in _picked(len(frames), length, pick)]


def _decoded(container: Any, stream: Any, size: int, stop: int | None, allowed: Allowance) -> Iterator[Array]:
    """The frames of a stream, up to `stop`, scaled; it raises where a frame is corrupt, or where some are missing."""
    allowed.check(3 * stream.width * stream.height)
    stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(int(allowed.bytes / 3))}
    count = 0
    for count, frame in enumerate(container.decode(stream), start=1):
        if frame.is_corrupt:
            raise ValueError(f"frame {count} is corrupt")
        allowed.check(3 * count * size**2)
        yield frame.reformat(size, size, "rgb24", interpolation="AREA").to_ndarray()
        if count == stop:
            return
    if count < max(stream.frames, 1):
        raise ValueError(f"{count} frames, of {stream.frames} that it states")


def _require_whole_segment(path: Path) -> None:
    """Raise where a file of Matroska, or WebM, ends before its segment does: such a file states no count of frames.

    The elements of the format, EBML (RFC 8794), are an identifier, a size, and as many bytes; of a stream that was
    written as it came the size is unknown.
    """
    with path.open("rb") as file:
        if file.read(4) != b"\x1a\x45\xdf\xa3":
            return
        size, _ = _ebml_size(file)
        file.seek(size, os.SEEK_CUR)  # over the header
        if file.read(4) != b"\x18\x53\x80\x67":
            raise ValueError("no segment in it")
        size, is_known = _ebml_size(file)
        missing = file.tell() + size - path.stat().st_size
    if is_known and missing > 0:
        raise ValueError(f"{missing} bytes are missing at its end")


def _ebml_size(file: BinaryIO) -> tuple[int, bool]:
    """A size, whose first byte tells by its zeros how many bytes it has, and whether it is known."""
    first = file.read(1)[0]
    more = 8 - first.bit_length()
    size = (first & ((1 << (7 - more)) - 1)) << 8 * more | int.from_bytes(file.read(more), "big")
    return size, size != (1 << 7 * (more + 1)) - 1


def write_video(path: Path, frames: Tensor, rate: int = 10) -> None:
    """Write a movie, by MPEG-4, which is lossy.

    Args:
        path: of the file, whose ending, of `MOVIE_ENDINGS`, says which container.
        frames: uint8, (frames, channels, height, width), of one channel or three and even sides.
        rate: frames a second.

    Raises:
        InputError: frames of another type or shape, or no package PyAV.
    """
    av = require_package("av", "video")
    is_even = frames.dim() == 4 and frames.shape[2] % 2 == 0 and frames.shape[3] % 2 == 0
    if frames.dtype != torch.uint8 or not is_even or frames.shape[1] not in (1, 3) or not len(frames):
        legal = "uint8, at least one frame, (frames, 1 or 3 channels, height, width), of even sides"
        raise InputError("frames of a video", f"{frames.dtype}, {tuple(frames.shape)}", legal)
    pixels = frames.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        stream.bit_rate = 8 * pixels[0].size * rate  # as much as the pixels have: nearly lossless
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
