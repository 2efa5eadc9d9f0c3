"""Batches of samples that overlap, in cells that are evaluated one by one and by several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.team import Team
from pdeopt.functions.sharing import share
from pdeopt.functions.smooth import SampledFunction, SmoothFunction


@dataclass(frozen=True)
class Evaluation:
    """Values and gradients of the cells at a point, and their mean by samples.

    Attributes:
        values, gradients: (cells,) and (cells, size).
        weights: samples of the cells, relative.
    """

    values: Tensor
    gradients: Tensor
    weights: Tensor

    @property
    def f(self) -> float:
        """The mean value."""
        return float(self.weights @ self.values)

    @property
    def g(self) -> Tensor:
        """The mean gradient."""
        return self.gradients[0] if len(self.weights) == 1 else self.weights @ self.gradients

    def of_part(self, number: int, parts: int) -> tuple[float, Tensor]:
        """Value and gradient of the mean over the cells of one of `parts`."""
        cells = slice(number, None, parts)
        weights = self.weights[cells] / self.weights[cells].sum()
        return float(weights @ self.values[cells]), weights @ self.gradients[cells]

    def uncertainty(self) -> float:
        """The squared error of the mean gradient, as its spread over the cells tells it."""
        spread = ((self.gradients - self.g) ** 2).sum(1)
        return float(self.weights @ spread) / max(len(self.weights) - 1, 1)


class Batches:
    """All samples, or batches one after the other, each with samples of the one before.

    A batch has the samples kept from the last, fresh ones, and fresh ones that are kept for the next. Each of the three
    is split in `parts`, the cells: so a part of the batch, too, shares samples with the same part of the next.

    Args:
        function: a `SampledFunction` where there are batches or parts.
        size: samples of a batch; 0 for all.
        overlap: share of a batch that is kept, 0 to 1/2.
        parts: in which each batch is split.
        seed: of the order of the samples.
        team: ranks that share the cells; all have the same samples.

    Raises:
        InputError: batches or parts of a function that is no mean over samples, or too few samples for the parts.
    """

    def __init__(
        self,
        function: SmoothFunction,
        size: int = 0,
        overlap: float = 0.5,
        parts: int = 1,
        seed: int = 0,
        team: Team | None = None,
    ) -> None:
        self.function, self.overlap, self.parts, self.team = function, overlap, parts, team
        self._samples = function.samples if isinstance(function, SampledFunction) else 0
        if (size or parts > 1) and not self._samples:
            raise InputError(
                f"batches or parts of samples of {type(function).__name__}",
                "no samples",
                "a SampledFunction, or all at once",
            )
        self.size = min(size, self._samples) if size else self._samples
        if parts > 1 and self.size < 4 * parts:
            raise InputError("samples of a batch", self.size, f"at least 4 for each of the {parts} parts")
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting = torch.empty(0, dtype=torch.int64)
        self._take(torch.empty(0, dtype=torch.int64))

    @property
    def whole(self) -> bool:
        """Whether the batch is all samples and will stay so."""
        return self._all

    def evaluate(self, x: Tensor, first: int = 0) -> Evaluation:
        """Value and gradient of the batch at x, from this cell on. Collective over the team."""
        cells = self._cells[first:]
        found = share(self.team, len(cells), lambda cell: cells[cell].value_and_gradient(x), self.function.tally)
        values = torch.tensor([value for value, _ in found], dtype=torch.float64)
        return Evaluation(values, torch.stack([g for _, g in found]), self._weights[first:])

    def advance(self, x: Tensor, at: Evaluation) -> Evaluation:
        """Go to the next batch; its evaluation at x, where that of the present batch is known."""
        if self._all:
            return at
        kept = self._pieces[-1][: self._kept]
        self._take(kept)
        known = self.parts if len(kept) and not self._all else 0
        new = self.evaluate(x, known)
        values, gradients = (
            torch.cat([old[len(old) - known :], fresh])
            for old, fresh in ((at.values, new.values), (at.gradients, new.gradients))
        )
        return self.known(values, gradients)

    def known(self, values: Tensor, gradients: Tensor) -> Evaluation:
        """What the cells of the batch have at some point."""
        return Evaluation(values, gradients, self._weights)

    def grow(self, factor: float) -> None:
        """Make the next batches larger."""
        self.size = min(round(factor * self.size), self._samples)

    def part(self, number: int) -> SmoothFunction:
        """The mean over a part of the batch."""
        if number not in self._made:
            own = [piece.tensor_split(self.parts)[number] for piece in self._pieces]
            self._made[number] = self._subset(torch.cat(own)) if own else self.function
        return self._made[number]

    @property
    def batch(self) -> SmoothFunction:
        """The mean over the batch."""
        if self._all or self.parts == 1:
            return self.function if self._all else self.part(0)
        return self._subset(torch.cat(self._pieces))

    def _take(self, kept: Tensor) -> None:
        """The next batch, which has these samples; or all."""
        self._all = self.size == self._samples
        if self._all:
            self._kept = 0
            self._pieces = [self._draw(self._samples)] if self.parts > 1 else []
        else:
            self._kept = int(self.overlap * self.size)
            fresh = max(self.size - len(kept) - self._kept, 0)
            pieces = kept, self._draw(fresh), self._draw(self._kept)
            self._pieces = [piece for piece in pieces if len(piece)]
        self._make_cells()

    def _draw(self, number: int) -> Tensor:
        """The next samples of one random order after the other."""
        while len(self._waiting) < number:
            order = torch.randperm(self._samples, generator=self._generator)
            self._waiting = torch.cat([self._waiting, order])
        drawn, self._waiting = self._waiting[:number].clone(), self._waiting[number:]
        return drawn

    def _make_cells(self) -> None:
        chunks = [chunk for piece in self._pieces for chunk in piece.tensor_split(self.parts)]
        self._cells = [self._subset(chunk) for chunk in chunks] or [self.function]
        self._made: dict[int, SmoothFunction] = {}
        lengths = torch.tensor([len(chunk) for chunk in chunks] or [1], dtype=torch.float64)
        self._weights = lengths / lengths.sum()

    def _subset(self, indices: Tensor) -> SmoothFunction:
        assert isinstance(self.function, SampledFunction)
        return self.function.subset(indices)

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""
        pieces = {f"piece{number}": piece for number, piece in enumerate(self._pieces)}
        numbers = {"size": self.size, "kept": self._kept, "all": float(self._all)}
        return pieces | numbers | {"waiting": self._waiting.clone(), "generator": self._generator.get_state()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""
        self.size, self._kept, self._all = int(memory["size"]), int(memory["kept"]), bool(memory["all"])
        self._waiting = memory["waiting"].clone()
        self._generator.set_state(memory["generator"])
        self._pieces = [memory[name] for name in sorted(memory) if name.startswith("piece")]
        self._make_cells()
