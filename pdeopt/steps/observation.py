"""What is measured: where (`Observation`, of a state) and when, with what outcome (`Measurements`).

Measured are the components or the products B u of a state, at all nodes of the grid or at some; entries that are
masked were not measured, and count nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.core.arrays import Array, real_array
from pdeopt.core.autodiff import constant, is_transformed
from pdeopt.core.errors import InputError
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.timegrid import Steps

#: Times of measurements may miss the nodes of the grid by this much of the latest time; more in single precision.
TIME_TOLERANCE = {4: 1e-6, 8: 1e-10}

COMPONENTS = "numbers of components, a mask (n,), a slice, or a matrix B (k, n)"
MISSING = "finite numbers; what was not measured is a masked entry: numpy.ma.masked_invalid(target)"


class Observation:
    """u -> what is seen of it: some components, or B u.

    Args:
        observe: numbers of components 0..n-1, where one that comes twice counts twice; a mask (n,); a slice, as Python
            has it; or B, (k, n), a scipy or dense matrix or a StepMatrix: a row a sensor, which weighs the components
            around its point.

    Attributes:
        given: the numbers of components, (k,), the slice, or B as a StepMatrix.

    Raises:
        InputError: none of these, or nothing to see.
    """

    def __init__(self, observe: Any) -> None:
        self._mask_size: int | None = None
        self.given: Tensor | slice | StepMatrix
        if isinstance(observe, StepMatrix):
            self.given = StepMatrix.constant(observe.as_csr("observe"), "observe")
        elif isinstance(observe, slice):
            self.given = observe
        elif sp.issparse(observe) or np.ndim(observe) == 2:
            self.given = StepMatrix.constant(observe, "observe")
        else:
            self.given = self._numbers(observe)
        if isinstance(self.given, StepMatrix) and not self.given.values.any():
            raise InputError("observe", f"a matrix of shape {self.given.shape} without entries", COMPONENTS)

    def _numbers(self, observe: Any) -> Tensor:
        array = observe.detach().cpu().numpy() if isinstance(observe, Tensor) else np.asanyarray(observe)
        if array.ndim == 1 and array.dtype.kind == "b" and not isinstance(array, np.ma.MaskedArray):
            self._mask_size, array = len(array), np.flatnonzero(array)
        if array.size == 0:
            raise InputError("observe", "nothing", COMPONENTS)
        if array.ndim != 1 or array.dtype.kind not in "iu" or isinstance(array, np.ma.MaskedArray):
            got = f"{type(observe).__name__} of shape {array.shape} and type {array.dtype}"
            raise InputError("observe", got, COMPONENTS)
        return torch.from_numpy(array.astype(np.int64))

    def check(self, n: int) -> None:
        """Raise `InputError` unless this can be seen of a state with n components."""
        if isinstance(self.given, StepMatrix):
            if self.given.shape[1] != n:
                raise InputError("observe", f"a matrix of shape {self.given.shape}", f"shape (k, {n})")
        elif self._mask_size not in (None, n):
            raise InputError("observe", f"a mask of shape ({self._mask_size},)", f"shape ({n},)")
        elif isinstance(self.given, slice):
            if not len(range(n)[self.given]):
                raise InputError("observe", f"{self.given}, which is nothing of {n} components", COMPONENTS)
        elif int(self.given.min()) < 0 or int(self.given.max()) >= n:
            wrong = next(int(i) for i in self.given if not 0 <= i < n)
            raise InputError("observe", f"component {wrong}", f"0 to {n - 1}")

    def __call__(self, u: Tensor) -> Tensor:
        """(..., n) -> (..., k)."""
        return self.given(u) if isinstance(self.given, StepMatrix) else u[..., self.given]

    def transpose(self, e: Tensor, n: int) -> Tensor:
        """(batch, k) -> (batch, n): what is seen of a component several times adds up."""
        if isinstance(self.given, StepMatrix):
            return self.given.transpose(e)
        return torch.zeros((*e.shape[:-1], n), dtype=e.dtype).index_add(-1, self._components(n), e)

    def matrix(self, n: int) -> sp.csr_matrix:
        """The matrix (k, n) of the map."""
        if isinstance(self.given, StepMatrix):
            return self.given.as_csr()
        components = self._components(n).numpy()
        entries = (np.ones(len(components)), components, np.arange(len(components) + 1))
        return sp.csr_matrix(entries, shape=(len(components), n))

    def _components(self, n: int) -> Tensor:
        return torch.arange(n)[self.given] if isinstance(self.given, slice) else self.given  # type: ignore[return-value]


class SeenForm:
    """B' P M P B for observations B, a form M of what is seen, and diagonal P of zeros and ones.

    The entries are linear in those of P M P, by a sparse matrix that is made once.

    Args:
        B: (k, n).
        mass: M, (k, k), one for all steps.
    """

    def __init__(self, B: sp.csr_matrix, mass: StepMatrix) -> None:
        self.mass = mass
        left, right = B[mass.sparsity.rows], B[mass.sparsity.cols]  # an entry of M pairs two rows of B
        pairs = np.diff(left.indptr) * np.diff(right.indptr)
        entry = np.repeat(np.arange(mass.sparsity.nnz), pairs)
        place = np.arange(entry.size) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        a, b = np.divmod(place, np.diff(right.indptr)[entry])
        a, b = left.indptr[entry] + a, right.indptr[entry] + b
        n = B.shape[1]
        keys, number = np.unique(left.indices[a].astype(np.int64) * n + right.indices[b], return_inverse=True)
        self.sparsity = Sparsity(sp.csr_matrix((np.ones(keys.size), np.divmod(keys, n)), shape=(n, n)))
        weights = left.data[a] * right.data[b]
        self._spread = sp.csr_matrix((weights, (number, entry)), shape=(keys.size, mass.sparsity.nnz))

    def __call__(self, kept: Tensor | None = None) -> StepMatrix:
        """The form where P is `kept`, (batch, k), or (1, k) for all steps alike; None for the identity."""
        values, pattern = self.mass.values, self.mass.sparsity
        if kept is not None:
            values = values * kept[:, torch.from_numpy(pattern.rows)] * kept[:, torch.from_numpy(pattern.cols)]
        return StepMatrix(self.sparsity, torch.from_numpy(np.ascontiguousarray((self._spread @ values.numpy().T).T)))


class Measurements:
    """The outcomes d_i of measurements, their weights in time w_i, and what was not measured.

    Args:
        target: (k,), the same at all times; (rows, k), one for each of `times` or for all nodes 0..N; or a function of
            the times, (batch,) -> (batch, k). Masked entries of a NumPy array were not measured.
        times: nodes of the grid at which there are measurements; None for all.
        weight: w, a number, or one for each row of the target; None for the trapezoidal weights of the grid.

    Attributes:
        target: the entries as a tensor with zeros where nothing was measured, or the function.

    Raises:
        InputError: other shapes, or entries that are not finite real numbers; all entries masked.
    """

    def __init__(self, target: Any, times: Any = None, weight: Any = None) -> None:
        self.target: Tensor | Callable[[Tensor], Any]
        self.kept: Tensor | None = None
        self._all_measured: Tensor | None = None  # the times of steps at which nothing is masked
        order = self._set_times(times)
        if callable(target):
            self.target = target
        else:
            self.target, self.kept = _entries(real_array(target, "target"))
            if isinstance(target, Tensor) and target.requires_grad:
                self.target = target.to(torch.float64)
            if self.target.ndim not in (1, 2):
                legal = "shape (N + 1, k), (k,) or a function of time"
                raise InputError("target", f"shape {tuple(self.target.shape)}", legal)
            if self.kept is not None and not self.kept.any():
                raise InputError("target", "masked entries alone", "some that were measured")
            if self.target.ndim == 2 and order is not None:
                self._require_rows(len(order), "one for each of `times`")
                self.target, self.kept = self.target[order], None if self.kept is None else self.kept[order]
        self._set_weight(weight, order)

    def _set_times(self, times: Any) -> Tensor | None:
        """Sort the times; returns their order."""
        self.times: Tensor | None = None
        if times is None:
            return None
        array = real_array(times, "times")
        if array.ndim != 1 or array.size == 0 or isinstance(array, np.ma.MaskedArray) or not np.isfinite(array).all():
            raise InputError("times", f"shape {array.shape}", "some finite nodes of the time grid, (rows,)")
        self.times, order = torch.from_numpy(array).sort()
        precision = getattr(times, "dtype", None)
        is_single = precision in (torch.float32, np.float32)
        self._tolerance = TIME_TOLERANCE[4 if is_single else 8] * float(self.times.abs().max())
        gaps = self.times.diff()
        if bool((gaps <= self._tolerance).any()):
            twice = float(self.times[int(gaps.argmin())])
            raise InputError("times", f"{twice:.6g} twice", "each once; several sensors are rows of `observe`")
        return order

    def _set_weight(self, weight: Any, order: Tensor | None) -> None:
        self._weight: Tensor | None = None
        if weight is None:
            return
        array = real_array(weight, "weight")
        rows = len(self.target) if isinstance(self.target, Tensor) and self.target.ndim == 2 else None
        rows = rows if order is None else len(order)
        legal = f"a number, or shape ({'N + 1' if rows is None else rows},)"
        if array.ndim > 1 or (array.ndim and rows not in (None, len(array))):
            raise InputError("weight", f"shape {array.shape}", legal)
        if isinstance(array, np.ma.MaskedArray) or not (
            np.isfinite(array).all() and (array >= 0).all() and array.any()
        ):
            raise InputError("weight", "entries that are not", f"finite numbers >= 0, not all 0: {legal}")
        self._weight = torch.from_numpy(array)
        if array.ndim and order is not None:
            self._weight = self._weight[order]

    def _require_rows(self, rows: int, what: str) -> None:
        if len(self.target) != rows:  # type: ignore[arg-type]
            shape = tuple(self.target.shape)  # type: ignore[union-attr]
            raise InputError("target", f"shape {shape}", f"{rows} rows, {what}, or shape (k,), or a function of time")

    def check(self, nodes: Array, k: int) -> None:
        """Raise `InputError` unless these are measurements of k numbers at times among the nodes of a grid."""
        if self.times is not None:
            for t in self.times.tolist():
                gap = np.abs(nodes - t)
                if gap.min() > self._tolerance:
                    near = nodes[int(gap.argmin())]
                    raise InputError("times", f"{t:.6g}", f"nodes of the time grid; the nearest is {near:.10g}")
        elif isinstance(self.target, Tensor) and self.target.ndim == 2:
            self._require_rows(len(nodes), "one for each node 0..N of the time grid")
        elif self._weight is not None and self._weight.ndim and len(self._weight) != len(nodes):
            raise InputError("weight", f"shape {tuple(self._weight.shape)}", f"a number, or shape ({len(nodes)},)")
        if isinstance(self.target, Tensor) and self.target.shape[-1] != k:
            legal = f"shape ({k},), (rows, {k}), or a function of time"
            raise InputError("target", f"shape {tuple(self.target.shape)}", legal)

    @property
    def is_integral(self) -> bool:
        """Whether the weights are those of the trapezoidal rule at all nodes."""
        return self._weight is None and self.times is None

    def weight(self, steps: Steps) -> Tensor:
        """w_i of a batch of steps, (batch,); 0 where nothing is measured."""
        weight = steps.weight if self._weight is None else self._weight
        row, is_measured = self._rows(steps)
        if self._weight is not None and weight.ndim:
            weight = weight[row]
        if is_measured is None:
            return weight.expand(len(steps))
        return torch.where(is_measured, weight, 0.0)

    def __call__(self, steps: Steps, k: int) -> tuple[Tensor, Tensor | None]:
        """d_i of a batch of steps, and 1 where they were measured, 0 else; None for ones.

        Args:
            steps: the steps.
            k: numbers that are measured at a time.

        Returns:
            (batch, k) or (1, k), each.

        Raises:
            InputError: a target of another shape; a function that returns one, or entries that are not finite.
        """
        row, is_measured = self._rows(steps)
        if not isinstance(self.target, Tensor):
            return self._evaluate(steps, k, is_measured)
        target, kept = self.target, self.kept
        if target.shape[-1] != k or (target.ndim == 2 and self.times is None and len(target) != steps.num_steps + 1):
            legal = f"shape ({steps.num_steps + 1}, {k}) or ({k},)"
            raise InputError("target", f"shape {tuple(target.shape)}", legal)
        if target.ndim == 1:
            return target[None], None if kept is None else kept[None]
        return target[row], None if kept is None else kept[row]

    def kept_at(self, steps: Steps, k: int) -> Tensor | None:
        """The second of what a call gives; a function that masked nothing at these very steps is not asked again."""
        if steps.t_new is self._all_measured:
            return None
        kept = self(steps, k)[1]
        if kept is None:
            self._all_measured = steps.t_new
        return kept

    def _evaluate(self, steps: Steps, k: int, is_measured: Tensor | None) -> tuple[Tensor, Tensor | None]:
        is_recorded = (
            torch.is_grad_enabled() and not is_transformed()
        )  # for derivatives by what the function is made of
        values = self.target(steps.t_new) if is_recorded else constant(self.target, steps.t_new)  # type: ignore[arg-type, operator]
        kept = None
        if not isinstance(values, Tensor) or values.is_complex():
            array = real_array(values, "target(t)")
            missing = np.ma.getmaskarray(array)  # type: ignore[no-untyped-call]
            values = torch.from_numpy(np.ma.filled(array, 0.0))  # type: ignore[no-untyped-call]
            kept = torch.from_numpy(1.0 - missing) if missing.any() else None
        if values.shape != (len(steps), k):
            raise InputError("target(t)", f"shape {tuple(values.shape)}", f"finite, shape ({len(steps)}, {k})")
        values = (values if is_recorded else values.detach()).to(torch.float64)  # by torch alone, for derivatives
        if is_measured is not None:
            values = torch.where(is_measured[:, None], values, 0.0)
        if not values.isfinite().all():
            raise InputError("target(t)", "NaN or infinite entries", MISSING)
        return values, kept

    def _rows(self, steps: Steps) -> tuple[Tensor, Tensor | None]:
        """Which row of the target belongs to each of the steps, and whether there is one; None where all have."""
        if self.times is None:
            return steps.index, None
        after = torch.searchsorted(self.times, steps.t_old + self._tolerance)
        before = torch.searchsorted(self.times, steps.t_new - self._tolerance)
        if bool((after < before).any()):
            t = float(self.times[int(after[after < before][0])])
            raise InputError("times", f"{t:.6g}, inside a time step", "nodes of the time grid")
        row = before.clamp(max=len(self.times) - 1)
        return row, (self.times[row] - steps.t_new).abs() <= self._tolerance


def _entries(values: Array, what: str = "target") -> tuple[Tensor, Tensor | None]:
    """The entries with 0 where masked, and 1 where measured; None where nothing is masked."""
    missing = np.ma.getmaskarray(values)  # type: ignore[no-untyped-call]
    entries = np.where(missing, 0.0, np.ma.getdata(values))  # type: ignore[no-untyped-call]
    if not np.isfinite(entries).all():
        raise InputError(what, "NaN or infinite entries", MISSING)
    return torch.from_numpy(entries), torch.from_numpy((~missing).astype(np.float64)) if missing.any() else None
