"""What a network takes in beside the coordinates themselves: periodic functions of them, and a check that all fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nn_adapters.pinn.jets import JetBasis
from pdeopt.core.errors import InputError

#: Differences of what should be equal a period apart, in units of its size.
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Features:
    """x -> features(x): a network of these is as periodic as they are.

    Args:
        function: (points, inputs) -> (points, size), made of torch operations; its rows do not interact.
        size: inputs of the network.
        periods: of the features, by the letters of the inputs in which they are periodic.
        even: letters of the inputs of which they are even functions.

    Example:
        >>> Features(lambda x: torch.stack([x[:, 0] ** 2, x[:, 1]], 1), 2, even="x")
    """

    function: Callable[[Tensor], Tensor]
    size: int
    periods: Mapping[str, float] = field(default_factory=dict)
    even: str = ""

    def __call__(self, x: Tensor) -> Tensor:
        """(points, inputs) -> (points, size)."""
        return self.function(x)

    def check(self, names: str, x: Tensor, parts: Mapping[str, Callable[[Tensor], Tensor] | None]) -> None:
        """Refuse what does not fit: u = lift + factor net is periodic, or even, only if lift and factor are.

        A factor such as 1 - x^2 has equal values at both ends of a period, and slopes that differ: u / factor is then
        no smooth function of periodic features, and training sticks.

        Args:
            names: of the inputs, a letter each.
            x: points at which values and first derivatives are compared with those a period on, (n, inputs).
            parts: lift and factor by these names; None for none.

        Raises:
            InputError: features of another shape, or a feature, lift or factor that does not have a period, or is not
                even, as stated.
        """
        found = self(x)
        if found.shape != (len(x), self.size):
            raise InputError("features", f"shape {tuple(found.shape)}", f"({len(x)}, {self.size})")
        if unknown := sorted({*self.periods, *self.even} - set(names)):
            raise InputError("periods of features", ", ".join(unknown), " | ".join(names))
        functions = {what: each for what, each in {"features": self, **parts}.items() if each is not None}
        self._check_periods(names, x, functions)
        for name in self.even:
            self._check_parities(name, names.index(name), x, functions)

    def _check_parities(
        self, name: str, i: int, x: Tensor, functions: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> None:
        """u is even where lift and factor are, and odd where these are odd; a network of the features is even."""
        mirrored = x.clone()
        mirrored[:, i] *= -1.0
        common = {1.0, -1.0} if "factor" in functions else {1.0}
        for what, function in functions.items():
            here, there = function(x), function(mirrored)
            own = {sign for sign in ((1.0,) if what == "features" else (1.0, -1.0)) if _equal(here, sign * there)}
            if not own or (what != "features" and not own & common):
                found = f"one that differs by {float((here - there).abs().max()):.1e} from itself at -{name}"
                legal = f"features even in {name}, and lift and factor both even or both odd; or no such features"
                raise InputError(what, found, legal)
            common &= own if what != "features" else common

    def _check_periods(self, names: str, x: Tensor, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        basis = JetBasis(names, tuple(names))
        for name, period in self.periods.items():
            on = x.clone()
            on[:, names.index(name)] += period
            for what, function in functions.items():
                here, there = basis.of_function(function, x), basis.of_function(function, on)
                if not _equal(here, there):
                    difference = float((here - there).abs().max())
                    raise InputError(
                        what,
                        f"one that differs by {difference:.1e} from itself at {name} + {period:g}",
                        f"one with the period of the features in {name}, with its slope; or no such features",
                    )


def stretched(features: Features, factors: Sequence[float], center: Sequence[float]) -> Features:
    """factors * (features - center), column by column: as if the first weights of a network were larger by the factors.

    With activation sin they are its first frequencies (V. Sitzmann, J. Martel, A. Bergman, D. Lindell, G. Wetzstein,
    Implicit neural representations with periodic activation functions, NeurIPS 2020).

    Args:
        features: what is stretched.
        factors, center: a number each column.

    Raises:
        InputError: another number of them than of columns.
    """
    if not len(factors) == len(center) == features.size:
        raise InputError("factors and centers of features", f"{len(factors)} and {len(center)}", features.size)
    by, middle = (torch.tensor(list(numbers), dtype=torch.float64) for numbers in (factors, center))
    return replace(features, function=lambda x: by.to(x.device) * (features.function(x) - middle.to(x.device)))


def _equal(here: Tensor, there: Tensor) -> bool:
    return bool((here - there).abs().max() <= TOLERANCE * (1.0 + float(here.abs().max())))


def periodic(names: str, periods: Mapping[str, float], order: int = 1) -> Features:
    """sin and cos of the multiples 1 ... order of 2 pi x / period for inputs with periods; the others as they are.

    S. Dong, N. Ni, A method for representing periodic functions and enforcing exactly periodic boundary conditions
    with deep neural networks, J. Comput. Phys. 435, 2021.

    Args:
        names: of the inputs, a letter each.
        periods: by their letters.
        order: of the last multiple.

    Raises:
        InputError: letters that are no inputs, periods that are not > 0, an order below 1.
    """
    if set(periods) - set(names) or not all(period > 0 for period in periods.values()) or order < 1:
        raise InputError("periodic features", f"{dict(periods)}, order {order}", f"periods > 0 of {names}, order >= 1")

    def function(x: Tensor) -> Tensor:
        columns = []
        for i, name in enumerate(names):
            if name not in periods:
                columns.append(x[:, i])
                continue
            for k in range(1, order + 1):
                angle = 2.0 * math.pi * k / periods[name] * x[:, i]
                columns += [torch.sin(angle), torch.cos(angle)]
        return torch.stack(columns, 1)

    return Features(function, len(names) + (2 * order - 1) * len(periods), dict(periods))
