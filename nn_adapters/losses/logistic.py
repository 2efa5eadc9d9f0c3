"""Regularized logistic regression as a mean over samples, all of it by products with the table of the samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import Costs, Tally
from pdeopt.functions.subsampling import WeightedSamples

#: In products with the table: a value takes one, a gradient or a Hessian product (at the point of a gradient) two.
LOGISTIC_COSTS = Costs(0.5, 1.0, 1.0)


class LogisticLoss(WeightedSamples):
    """f(x) = sum_i w_i log(1 + exp(-y_i a_i.x)) + lambda/2 |x|^2, w_i = 1/N, with all Hessian products.

    The margins y * A x of the last point are kept: a Hessian product there takes two products with A or A'. One
    elsewhere takes a third, which counts as a value's work. As a `WeightedSamples` it serves sub-sampled methods.

    Args:
        rows: A, (N, n) double precision: a NumPy array, a tensor, or a sparse matrix of SciPy (CSR). Not copied.
        labels: y, (N,), -1 or 1.
        regularization: lambda; by default 1/N, which subsets keep.
        costs, tally: see `SmoothFunction`.

    Raises:
        InputError: no samples, numbers that are not finite or not of double precision, other labels, or more or fewer
            labels than samples.

    Example:
        >>> f = LogisticLoss(rows, labels)
        >>> result = LBFGS(f).minimize(torch.zeros(f.size, dtype=torch.float64))
        >>> f.accuracy(result.design)
    """

    def __init__(
        self,
        rows: Any,
        labels: Any,
        regularization: float | None = None,
        costs: Costs = LOGISTIC_COSTS,
        tally: Tally | None = None,
    ) -> None:
        self.rows: Any = rows.numpy() if isinstance(rows, Tensor) else rows
        self.labels = torch.as_tensor(labels, dtype=torch.float64)
        samples, size = self.rows.shape
        super().__init__(size, samples, costs=costs, tally=tally)
        if tally is None:  # a subset is part of what was checked
            _check(self.rows, self.labels)
        self.regularization = 1.0 / samples if regularization is None else regularization
        self.weights = torch.full((samples,), 1.0 / samples, dtype=torch.float64)
        self._kept: tuple[Tensor, Tensor] | None = None  # the last point, and y * A x there
        self._squares: Tensor | None = None  # |a_i|^2

    def subset(self, indices: Tensor, factors: Tensor | None = None) -> LogisticLoss:
        """The mean over these samples, or their weighted sum; a slice shares the memory of the table.

        Args:
            indices: of the samples, (k,).
            factors: of their weights, (k,); None for the mean.

        Raises:
            InputError: no indices.
        """
        if not len(indices):
            raise InputError("subset of samples", "none", f"1 to {self.samples} of them")
        first, last = int(indices[0]), int(indices[-1])
        consecutive = len(indices) == last - first + 1 and bool((indices.diff() == 1).all())
        rows = self.rows[first : last + 1] if consecutive else self.rows[indices.numpy()]
        share = len(indices) / self.samples
        part = LogisticLoss(rows, self.labels[indices], self.regularization, self.costs.times(share), self.tally)
        weights = self.weights[indices]
        part.weights = weights / weights.sum() if factors is None else weights * factors
        part._squares = None if self._squares is None else self._squares[indices]
        return part

    def importance(self, x: Tensor) -> Tensor:
        """w_i p_i (1 - p_i) |a_i|^2, (N,), p_i the probability of a label other than y_i."""
        self._count_margins(x)
        p = torch.sigmoid(self._margins(x))
        if self._squares is None:  # about as much work as a product with the table
            self.tally.work += self.costs.value
            rows = self.rows
            dense = isinstance(rows, np.ndarray)
            squares = np.einsum("ij,ij->i", rows, rows) if dense else rows.multiply(rows).sum(1)
            self._squares = torch.as_tensor(np.asarray(squares).ravel())
        return self.weights * p * (1.0 - p) * self._squares

    def memory(self) -> dict[str, Any]:
        """What `recall` takes: what is known of the samples, so that a run that goes on counts the same work."""
        return {
            "margins_at": torch.empty(0, dtype=torch.float64) if self._kept is None else self._kept[0].clone(),
            "has_squares": self._squares is not None,
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """Know again what `memory` said, and count nothing."""
        work = self.tally.work
        if len(memory["margins_at"]):
            self._margins(memory["margins_at"])
        if memory["has_squares"]:
            self.importance(torch.zeros(self.size, dtype=torch.float64) if self._kept is None else self._kept[0])
        self.tally.work = work

    def accuracy(self, x: Tensor) -> float:
        """The share of the samples on their side of the hyperplane a.x = 0, 0..1."""
        return float((self._margins(x) > 0).double().mean())

    def _value(self, x: Tensor) -> float:
        losses = torch.logaddexp(torch.zeros((), dtype=torch.float64), -self._margins(x))
        return float(self.weights @ losses + 0.5 * self.regularization * (x @ x))

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        slopes = -self.labels * torch.sigmoid(-self._margins(x)) * self.weights
        return self._value(x), self._transposed(slopes) + self.regularization * x

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        self._count_margins(x)
        p = torch.sigmoid(self._margins(x))
        return self._transposed(self.weights * p * (1.0 - p) * self._times(d)) + self.regularization * d

    def _margins(self, x: Tensor) -> Tensor:
        if self._kept is None or not torch.equal(self._kept[0], x):
            self._kept = x.clone(), self.labels * self._times(x)
        return self._kept[1]

    def _count_margins(self, x: Tensor) -> None:
        if self._kept is None or not torch.equal(self._kept[0], x):
            self.tally.work += self.costs.value

    def _times(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.rows @ x.numpy())

    def _transposed(self, v: Tensor) -> Tensor:
        return torch.as_tensor(self.rows.T @ v.numpy())


def _check(rows: Any, labels: Tensor) -> None:
    samples = rows.shape[0]
    if not samples or len(labels) != samples:
        raise InputError("samples", f"{samples} with {len(labels)} labels", "as many labels, at least one")
    if not bool(((labels == 1) | (labels == -1)).all()):
        raise InputError("labels", labels.unique().tolist()[:5], "-1 and 1")
    if rows.dtype != np.float64:
        raise InputError("samples", rows.dtype, "double precision")
    if not np.isfinite((rows if isinstance(rows, np.ndarray) else rows.data).sum()):
        raise InputError("samples", "entries that are not finite", "finite numbers")
