"""Points in a box: Hammersley's, Latin hypercubes, random ones, and more of them where a residual is large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor

from pdeopt.core.errors import InputError

#: A box: (low, high) of each input.
Intervals = Sequence[tuple[float, float]]

#: (n, box, seed) -> n points, (n, inputs).
Sampler = Callable[..., Tensor]

_PRIMES = (2, 3, 5, 7, 11, 13)


def hammersley(n: int, box: Intervals, seed: int = 0) -> Tensor:
    """Hammersley's points, (n, inputs): ((i + 1/2) / n, radical inverses of i to the bases 2, 3, 5, ...), i < n.

    J. M. Hammersley, Monte Carlo methods for solving multivariable problems, Ann. New York Acad. Sci. 86, 1960.

    Args:
        n: how many.
        box: (low, high) of each input, at most seven.
        seed: not used: nothing is random.

    Raises:
        InputError: no points, no inputs or too many, or an interval that is empty.
    """
    _check(n, box)
    i = np.arange(n)
    columns = [(i + 0.5) / n, *(_radical_inverse(i, base) for base in _PRIMES[: len(box) - 1])]
    return into_box(box, torch.from_numpy(np.stack(columns, 1)))


def latin_hypercube(n: int, box: Intervals, seed: int = 0) -> Tensor:
    """A Latin hypercube, (n, inputs): one point in each of n slices of every input.

    M. D. McKay, R. J. Beckman, W. J. Conover, A comparison of three methods for selecting values of input variables,
    Technometrics 21, 1979.

    Args:
        n, box: as for `hammersley`.
        seed: of the random numbers.
    """
    _check(n, box)
    return into_box(box, torch.from_numpy(qmc.LatinHypercube(len(box), seed=seed).random(n)))


def uniform_points(n: int, box: Intervals, seed: int = 0) -> Tensor:
    """Independent, uniformly distributed points, (n, inputs).

    Args:
        n, box: as for `hammersley`.
        seed: of the random numbers.
    """
    _check(n, box)
    generator = torch.Generator().manual_seed(seed)
    return into_box(box, torch.rand(n, len(box), generator=generator, dtype=torch.float64))


def adaptive_points(
    residual: Callable[[Tensor], Tensor],
    n: int,
    box: Intervals,
    seed: int = 0,
    power: float = 1.0,
    floor: float = 1.0,
    candidates: int = 10,
    sampler: Sampler | None = None,
) -> Tensor:
    """Points where a residual r is large, (n, inputs): probability proportional to |r|^power / mean |r|^power + floor.

    They are drawn without repetition from uniform candidates.

    C. Wu, M. Zhu, Q. Tan, Y. Kartha, L. Lu, A comprehensive study of non-adaptive and residual-based adaptive
    sampling for physics-informed neural networks, Comput. Methods Appl. Mech. Engrg. 403, 2023 (RAD).

    Args:
        residual: r, (m, inputs) -> (m,).
        n, box: as for `hammersley`.
        seed: of the random numbers.
        power: the larger, the more points where the residual is large.
        floor: the larger, the more points elsewhere.
        candidates: their number, over n.
        sampler: of the candidates; `uniform_points` by default.

    Raises:
        InputError: a residual that is not finite.

    Example:
        >>> f = f.with_points(adaptive_points(lambda x: f.residuals(theta, x), 2000, [(-1, 1), (0, 1)]))
    """
    points = (sampler or uniform_points)(n * candidates, box, seed)
    size = residual(points).abs().double().cpu() ** power
    if not bool(torch.isfinite(size).all()):
        raise InputError("residual for sampling", "values that are not finite", "finite ones")
    density = size / size.mean().clamp(min=1e-300) + floor
    generator = torch.Generator().manual_seed(seed + 1)
    return points[torch.multinomial(density, n, generator=generator)]


def within(inside: Callable[[Tensor], Tensor], sampler: Sampler = uniform_points) -> Sampler:
    """The sampler of the part of a box that is a domain of another shape.

    Args:
        inside: which of some points, (m, inputs), are in the domain: (m,), bool; as by a distance function that is > 0.
        sampler: of the box; of its points, as many as it takes, those inside are kept, and evenly fewer of them.

    Raises:
        InputError: on a call, where the domain has less than a thousandth of the box.

    Example:
        >>> disk = within(lambda x: x.square().sum(1) < 1.0)
        >>> x = disk(500, [(-1.0, 1.0), (-1.0, 1.0)], seed=0)
    """

    def draw(n: int, box: Intervals, seed: int = 0) -> Tensor:
        share = 1.0
        while share > 1e-3:
            x = sampler(round(n / share), box, seed)
            kept = x[inside(x)]
            if len(kept) >= n:
                return kept[torch.linspace(0, len(kept) - 1, n, dtype=torch.float64).round().long()]
            share = min(0.95 * share, 0.99 * len(kept) / len(x))
        raise InputError("domain in a box", f"{len(kept)} of {len(x)} points", "a thousandth of the box, or more")

    return draw


def into_box(box: Intervals, unit: Tensor) -> Tensor:
    """Points of the unit cube, mapped to the box: (n, inputs).

    Args:
        box: (low, high) of each input.
        unit: points of the unit cube, (n, inputs).
    """
    low, high = torch.tensor(list(box), dtype=torch.float64).unbind(1)
    return unit * (high - low) + low


def _radical_inverse(i: Any, base: int) -> Any:
    """The digits of i mirrored at the point: sum of d_k base^k becomes the sum of d_k base^(-k-1)."""
    i, found, weight = i.copy(), np.zeros(len(i)), 1.0 / base
    while i.any():
        i, digit = np.divmod(i, base)
        found += weight * digit
        weight /= base
    return found


def _check(n: int, box: Intervals) -> None:
    if n < 1:
        raise InputError("points", n, "an integer >= 1")
    if not 1 <= len(box) <= len(_PRIMES) + 1 or any(not low < high for low, high in box):
        raise InputError("box", box, f"1 to {len(_PRIMES) + 1} pairs low < high")


#: By name.
POINT_SAMPLERS: dict[str, Sampler] = {"hammersley": hammersley, "lhs": latin_hypercube, "uniform": uniform_points}
