"""Ways to make a layer smaller: each offers levels, from few bytes to many, with their errors in the outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nn_adapters.compression.forms import BITS, stored, stored_bytes
from nn_adapters.compression.inputs import InputMoments
from pdeopt.core.errors import InputError

#: Shares of entries that pruning can keep.
DENSITIES = tuple(float(d) for d in torch.logspace(-2.0, -0.1, 24))


@dataclass(frozen=True)
class Variant:
    """A smaller version of a layer.

    Attributes:
        name: what it is, as "rank 20".
        error: of the outputs, relative root mean square; by `InputMoments.error`.
        nbytes: that it takes.
        make: makes the module.
    """

    name: str
    error: float
    nbytes: int
    make: Callable[[], nn.Module]


class Compression(ABC):
    """A way to make layers smaller.

    Args:
        moments: whether errors are those of outputs for inputs of the data, else for inputs of variance 1.
    """

    def __init__(self, moments: bool = True) -> None:
        self.moments = moments

    def levels(self, layer: nn.Module, moments: InputMoments | None = None) -> list[Variant]:
        """Versions of a layer, each with fewer bytes and a larger error than the next; the layer itself is the last.

        Args:
            layer: Linear or Conv2d, see `compressible`.
            moments: of its inputs; None, or a compression without moments: independent ones.
        """
        known = moments if moments is not None and self.moments else InputMoments.unknown(layer)
        whole = Variant("as it was", 0.0, stored_bytes(layer), lambda: layer)
        with torch.no_grad():
            found = [level for level in self.candidates(layer, known) if level.nbytes < whole.nbytes]
        front: list[Variant] = [whole]
        for level in sorted(found, key=lambda one: (-one.nbytes, one.error)):
            while len(front) > 1 and front[-1].error >= level.error:
                front.pop()
            if level.nbytes < front[-1].nbytes:
                front.append(level)
        return front[::-1]

    @abstractmethod
    def candidates(self, layer: nn.Module, moments: InputMoments) -> list[Variant]:
        """Versions of a layer in any order; no gradients are recorded."""


class Pruning(Compression):
    """The entries with the least w_ij^2 var(a_j) become zero, and the bias makes up for the mean of what goes.

    Without moments, those of least size (S. Han, J. Pool, J. Tran, W. J. Dally, NeurIPS 2015); with them, those that
    the outputs miss least one by one (Wanda: M. Sun, Z. Liu, A. Bair, J. Z. Kolter, ICLR 2024).

    Args:
        moments: as `Compression`.
        densities: shares of entries that can be kept, in (0, 1).

    Raises:
        InputError: other densities.
    """

    def __init__(self, moments: bool = True, densities: tuple[float, ...] = DENSITIES) -> None:
        super().__init__(moments)
        if not densities or not all(0.0 < share < 1.0 for share in densities):
            raise InputError("densities", densities, "numbers between 0 and 1")
        self.densities = densities

    def candidates(self, layer: nn.Module, moments: InputMoments) -> list[Variant]:
        W = _matrix(layer)
        scores = W.double().square() * (1.0 if moments.importance is None else moments.importance)
        order = scores.reshape(-1).argsort(descending=True)
        found = []
        for share in self.densities:
            kept = torch.zeros_like(W).reshape(-1)
            places = order[: max(1, round(share * len(order)))]
            kept[places] = W.reshape(-1)[places]
            found.append(_level(f"{100 * share:.2g} %", layer, kept.reshape(W.shape), None, moments))
        return found


class Quantization(Compression):
    """Whole numbers of 2, 4 or 8 bits with a scale for each output; the bias keeps the mean of the outputs.

    Scales make the squared error least, weighted by the variances of the inputs. The bias is adapted as by M. Nagel,
    M. van Baalen, T. Blankevoort, M. Welling, ICCV 2019, with measured means. Activations are not rounded.

    Args:
        moments: as `Compression`.
        bits: that an entry can have, see `BITS`.

    Raises:
        InputError: other bits.
    """

    def __init__(self, moments: bool = True, bits: tuple[int, ...] = BITS) -> None:
        super().__init__(moments)
        if not bits or not set(bits) <= set(BITS):
            raise InputError("bits", bits, f"some of {BITS}")
        self.bits = bits

    def candidates(self, layer: nn.Module, moments: InputMoments) -> list[Variant]:
        return [_level(f"{bits} bits", layer, _matrix(layer), bits, moments) for bits in self.bits]


def _matrix(layer: nn.Module) -> Tensor:
    """The weight, (outputs, inputs)."""
    weight: Tensor = layer.weight.detach()  # type: ignore[union-attr, operator, assignment]
    return weight.reshape(len(weight), -1)


def _level(name: str, layer: nn.Module, W: Tensor, bits: int | None, moments: InputMoments) -> Variant:
    """That of a weight in a stored form."""
    old: Tensor = layer.weight.detach()  # type: ignore[union-attr, operator, assignment]

    def make(bias: Tensor | None = None) -> nn.Module:
        return stored(layer, W.reshape(old.shape), bias, bits, moments.importance)

    change = _matrix(layer) - _matrix(made := make())
    bias = moments.bias(layer.bias, change)  # type: ignore[arg-type]
    return Variant(name, moments.error(change, _matrix(layer)), stored_bytes(made), lambda: make(bias))
