"""Samples that a large batch needs more of than there are: running mixup, and images with erased rectangles."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.errors import InputError

#: Area of an erased rectangle as a part of the image, and its height / width, from and to (Zhong et al., table 1).
AREA, ASPECT = (0.02, 0.25), (0.3, 1.0 / 0.3)


class RunningMixup:
    """Virtual samples: each batch is mixed with the virtual batch before it.

        x~_t = a x_t + (1 - a) x~_{t-1},   y~_t = a y_t + (1 - a) y~_{t-1},   a ~ Beta(alpha, alpha)

    (K. Osawa, Y. Tsuji, Y. Ueno, A. Naruse, R. Yokota, S. Matsuoka, Large-scale distributed second-order optimization
    using Kronecker-factored approximate curvature, arXiv 1811.12019, 2018; mixup itself mixes two samples of one batch:
    H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz, ICLR 2018). Samples beyond the number of those before stay as they
    are, and so does the first batch.

    Args:
        classes: of the targets.
        alpha: of the distribution, > 0; 1 draws uniformly, less mixes less.
        seed: of the factors, which are the same on all ranks.

    Raises:
        InputError: an alpha that is not positive.

    Example:
        >>> mix = RunningMixup(classes=10, alpha=0.4)
        >>> x, y = mix(x, labels)  # y: shares of the classes, which CrossEntropy takes, too
    """

    def __init__(self, classes: int, alpha: float = 0.4, seed: int = 0) -> None:
        if not alpha > 0.0:
            raise InputError("alpha of running mixup", alpha, "> 0")
        self.classes, self.alpha, self.seed = classes, alpha, seed
        self.count, self.last = 0, (torch.empty(0), torch.empty(0))

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The virtual samples of a batch.

        Args:
            x: samples, (samples, ...).
            y: their classes, (samples,).

        Returns:
            samples of the shape of x, and shares of the classes, (samples, classes).
        """
        targets = torch.nn.functional.one_hot(y, self.classes).to(x.dtype)
        a = float(np.random.default_rng((self.seed, self.count)).beta(self.alpha, self.alpha))
        self.last = tuple(_mixed(a, new, old) for new, old in zip((x, targets), self.last))  # type: ignore[assignment]
        self.count += 1
        return self.last

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""
        return {"count": self.count, "x": self.last[0], "y": self.last[1]}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave, to the last bit."""
        self.count, self.last = int(memory["count"]), (memory["x"], memory["y"])


def _mixed(a: float, new: Tensor, old: Tensor) -> Tensor:
    both = min(len(new), len(old))
    return torch.cat([a * new[:both] + (1.0 - a) * old[:both], new[both:]]) if both else new


def erase_rectangles(x: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Images of which some have a rectangle of zeros, of random size and place.

    (Z. Zhong, L. Zheng, G. Kang, S. Li, Y. Yang, Random erasing data augmentation, AAAI 2020; with the value zero as
    Osawa et al. have it.)

    Args:
        x: images, (samples, channels, height, width); they stay as they are.
        share: of the images that lose a rectangle, 0 to 1.
        generator: of the random numbers.

    Raises:
        InputError: no images, or another share.
    """
    if x.dim() != 4 or not 0.0 <= share <= 1.0:
        legal = "(samples, channels, height, width) and 0 to 1"
        raise InputError("images and share of erased ones", f"{tuple(x.shape)} and {share}", legal)
    draws = torch.rand(5, len(x), generator=generator, dtype=torch.float64)
    area = AREA[0] + (AREA[1] - AREA[0]) * draws[0]
    aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** draws[1]
    rows = _inside(x.shape[2], (area * aspect).sqrt(), draws[2])
    columns = _inside(x.shape[3], (area / aspect).sqrt(), draws[3])
    erased = rows[:, None, :, None] & columns[:, None, None, :] & (draws[4] < share)[:, None, None, None]
    return x.masked_fill(erased, 0.0)


def _inside(size: int, part: Tensor, place: Tensor) -> Tensor:
    """Which of `size` pixels are in an interval of a part of them, whose place is from 0 to 1; (samples, size)."""
    length = (part * size).round().clamp(1, size)
    begin = (place * (size - length + 1)).floor()
    at = torch.arange(size)
    return (at >= begin[:, None]) & (at < (begin + length)[:, None])
