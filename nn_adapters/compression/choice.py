"""How much smaller each layer becomes: as much as a tolerance on the accuracy allows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from nn_adapters.compression.forms import evaluating, stored_bytes
from nn_adapters.compression.inputs import compressible, input_moments, replaced
from nn_adapters.compression.methods import Compression, Variant
from pdeopt.core.errors import InputError

#: With training after compression, tolerances before it that are tried, in units of the tolerance.
LOOSE = (32.0, 16.0, 8.0, 4.0, 2.0, 1.0)


@dataclass(frozen=True)
class Compressed:
    """A network that was made smaller.

    Attributes:
        network: the smaller one.
        levels: of its layers, by name.
        accuracy, before: of the network now and as it was, by the function that was given.
        nbytes: of all parameters and buffers.
        evaluations: of that function.
    """

    network: nn.Module
    levels: Mapping[str, Variant]
    accuracy: float
    before: float
    nbytes: int
    evaluations: int


def compress(
    network: nn.Module,
    how: Compression,
    accuracy: Callable[[nn.Module], float],
    tolerance: float,
    x: Tensor | None = None,
    tune: Callable[[nn.Module], object] | None = None,
) -> Compressed:
    """Make a trained network smaller until its accuracy has fallen by a tolerance; it stays as it is.

    One bound of the error of a layer's outputs is for all layers, and is found by bisection; then each layer in turn,
    the largest first, goes to fewer bytes as far as the tolerance still allows. As accuracy is not monotone in the
    bound, what is returned is not the smallest possible; but its accuracy was measured, and is within the tolerance.

    Args:
        network: of which the Linear and Conv2d layers are compressed, see `compressible`.
        how: `LowRankLayers()`, `Pruning()`, `Quantization()`.
        accuracy: of a network, higher is better; of samples that are neither of the training nor of the test.
        tolerance: >= 0, how much accuracy may be lost.
        x: samples for the moments of the layers' inputs; None: inputs count alike.
        tune: trains a network that is smaller, in place. Then compression goes beyond the tolerance, and the training
            has to bring the accuracy back; the first of 32, 16, ... 1 tolerances from which it does is taken.

    Raises:
        InputError: a tolerance that is no tolerance, an accuracy that is not finite, no layer.

    Example:
        >>> def score(network):
        ...     return accuracy(network, x_validation, y_validation)
        >>> found = compress(network, LowRankLayers(), score, 0.005, x[:5000])
        >>> found.network, found.nbytes, {name: one.name for name, one in found.levels.items()}
    """
    if not (math.isfinite(tolerance) and tolerance >= 0.0):
        raise InputError("tolerance on the accuracy", tolerance, "a number >= 0")
    search = _Search(network, how, accuracy, x)
    if not math.isfinite(search.before):
        raise InputError("accuracy of the network", search.before, "a finite number")
    least = search.before - tolerance
    for factor in LOOSE if tune is not None else (1.0,):
        chosen, smaller, found = search.within(search.before - factor * tolerance)
        if tune is None:
            break
        tuned = copy.deepcopy(smaller)
        tune(tuned)
        if (after := search.measure(tuned)) >= least or (factor == 1.0 and after >= found):
            smaller, found = tuned, after
            break
    return Compressed(smaller, chosen, found, search.before, stored_bytes(smaller), search.evaluations)


@dataclass
class _Search:
    """Levels of all layers, and the accuracy of networks made of them."""

    network: nn.Module
    how: Compression
    accuracy: Callable[[nn.Module], float]
    x: Tensor | None
    levels: dict[str, list[Variant]] = field(init=False)
    before: float = field(init=False)
    evaluations: int = 0

    def __post_init__(self) -> None:
        moments = input_moments(self.network, self.x) if self.x is not None and self.how.moments else {}
        self.levels = {
            name: self.how.levels(layer, moments.get(name)) for name, layer in compressible(self.network).items()
        }
        self.before = self.measure(self.network)

    def measure(self, network: nn.Module) -> float:
        self.evaluations += 1
        with evaluating(network):
            return self.accuracy(network)

    def within(self, least: float) -> tuple[dict[str, Variant], nn.Module, float]:
        """Levels with at least this accuracy, the network and its accuracy."""
        whole = {name: levels[-1] for name, levels in self.levels.items()}
        best = whole, self.network, self.before

        def is_enough(chosen: dict[str, Variant]) -> bool:
            nonlocal best
            network = self._made(chosen)
            if (found := self.measure(network)) < least:
                return False
            best = chosen, network, found
            return True

        bounds = sorted({level.error for levels in self.levels.values() for level in levels})
        _bisect(len(bounds), lambda k: is_enough(self._below(bounds[-1 - k])))
        for name in sorted(whole, key=lambda name: -best[0][name].nbytes):
            chosen = best[0]
            smaller = [level for level in self.levels[name] if level.nbytes < chosen[name].nbytes]
            _bisect(len(smaller), lambda k, c=chosen, n=name, s=smaller: is_enough(c | {n: s[k]}))  # type: ignore[misc]
        return best

    def _below(self, bound: float) -> dict[str, Variant]:
        """Of each layer the fewest bytes with at most this error."""
        return {name: next(one for one in levels if one.error <= bound) for name, levels in self.levels.items()}

    def _made(self, chosen: Mapping[str, Variant]) -> nn.Module:
        changed = {name: level.make() for name, level in chosen.items() if level is not self.levels[name][-1]}
        return replaced(self.network, changed)


def _bisect(count: int, is_enough: Callable[[int], bool]) -> None:
    """Look for the first of `count` places, fewest bytes first, that is enough, as if all after it were."""
    low, high = 0, count  # those from `high` on are enough
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
