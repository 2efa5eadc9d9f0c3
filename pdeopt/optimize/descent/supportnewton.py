"""Support vector machines by Newton's method: proximal steps of the dual, each a smooth problem in few unknowns.

The matrix of the kernel is Phi'Phi with few rows, so that the machine is min |w|^2 / 2 + C sum_s max(0, 1 - y_s g_s)
with g = Phi'w + b. Its dual, min |Phi a|^2 / 2 - y'a over 0 <= y_s a_s <= C with sum a = 0, is solved by proximal
steps: with sigma |a - center|^2 / 2 added, w and b alone are unknown, of a smooth convex function whose second
derivatives come from the few a_s that are free (as in X. Li, D. Sun, K.-C. Toh, A highly efficient semismooth Newton
augmented Lagrangian method for solving Lasso problems, SIAM J. Optim. 28, 2018). Most samples are far from the margin:
they stay at their bound until a look at all of them says otherwise, as in chunking (E. Osuna, R. Freund, F. Girosi, An
improved training algorithm for support vector machines, NNSP 1997).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from petsc4py import PETSc

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import History, Monitor, Reason, Result, SplitRecord, print_monitor
from pdeopt.core.settings import Settings, read, setting
from pdeopt.lowrank.kernels import Array, require_positive
from pdeopt.lowrank.pivoted import PivotedCholesky
from pdeopt.optimize.parts.loop import iterate

#: Half the width of the zone in which the first proximal step has free samples, of the margin's 1: on the coarsest
#: subset, and on others; the factor of sigma from step to step.
COARSE_ZONE, ZONE, SHRINK = 0.25, 0.05, 0.2

#: A bound beyond which the first a is not taken from it; the least sigma, of the mean of k(x, x).
LARGE, SINGULAR = 10.0, 1e-9

#: Samples of the coarsest subset, and of a working set at least; the part of all samples that it has.
FEW, PART = 1000, 0.125

#: Newton steps of a proximal step at most; its residual, of the distance that it moves.
MOST_STEPS, INEXACT = 100, 1e-2

#: Instead of an objective of 0, where it divides.
LEAST = 1e-300

#: Of the sum of all bounds: what a sum that should vanish may differ.
ROUNDING = 1e-15


@dataclass(frozen=True)
class SupportNewtonSettings(Settings, prefix="svm_"):
    """Support vector machines by Newton's method."""

    rtol: float = setting(1e-7, "duality gap, relative to the objective, at which a run has converged", above=0)
    max_it: int = setting(100, "proximal steps at most", at_least=0)
    seed: int = setting(0, "of the order in which samples are taken into subsets", at_least=0)
    monitor: bool = setting(False, "print a line a proximal step")


class SupportVectorNewton:
    """The dual of a support vector machine: min |Phi a|^2 / 2 - y'a with sum a = 0 and 0 <= y_s a_s <= C.

    The first w and b come from subsets, each of four times as many samples. The objectives of the machine and of its
    dual enclose the value; the run ends where they are close.

    Args:
        factor: Phi.
        labels: y, (n,), -1 or 1, on each rank.
        bound: C.
        settings: by default from the options -svm_*.

    Attributes:
        offset: b of the decision function sum_s k(x, x_s) a_s + b.
        gap: of the last look at all samples, relative.

    Raises:
        InputError: labels other than -1 and 1, of one class only, or of another number; a bound that is not positive;
            a factor whose rows did not suffice.

    Example:
        >>> machine = SupportVectorNewton(PivotedCholesky(Gaussian(0.2), x), y, bound=1.0)
        >>> machine.solve().design                             # a by points, (n,)
    """

    _work: _WorkingSet
    _sigma: float
    _worst: float

    def __init__(
        self, factor: PivotedCholesky, labels: Any, bound: float, settings: SupportNewtonSettings | None = None
    ) -> None:
        self.settings = read(SupportNewtonSettings) if settings is None else settings
        self.factor, self.comm = factor, factor.comm
        self.bound = require_positive("bound of support vectors", bound)
        if factor.rest > factor.rtol:
            got = f"{len(factor.phi)} rows, which leave {factor.rest:.1e} of the trace"
            raise InputError("factor of support vectors", got, f"at most {factor.rtol:.1e}: more rows, or ADMM")
        self._y = labels_of(labels, factor.n)[factor.own]
        self._w, self.offset, self._a = np.zeros(len(factor.phi)), 0.0, np.zeros_like(self._y)
        self.gap, self._objective, self._newton, self._note = np.inf, 0.0, 0, "start"
        trace = _total(self.comm, float(np.sum(factor.phi**2)))
        self._scale = float(trace / factor.n)  # mean of k(x, x)

    def solve(self, *, monitors: Sequence[Monitor] = ()) -> Result:
        """Take proximal steps until the gap is small. Collective.

        Args:
            monitors: called with each record: gap as `optimality`, Newton steps so far as `solves`.
        """
        if self.settings.monitor:
            monitors = [print_monitor(PETSc.COMM_WORLD, "support vectors"), *monitors]
        self._start()

        def test(record: SplitRecord) -> Reason:
            if not np.isfinite(record.objective):
                return Reason.DIVERGED_NAN
            if record.optimality <= self.settings.rtol:
                return Reason.CONVERGED_OPTIMALITY
            return Reason.DIVERGED_MAX_IT if record.iteration >= self.settings.max_it else Reason.ITERATING

        return iterate(self, test, monitors=monitors)

    def record(self, iteration: int) -> SplitRecord:
        """The present point in numbers."""
        return SplitRecord(iteration, -self._objective, 0.0, self.gap, 0.0, float(self._newton), 0, self._note)

    def step(self) -> Reason:
        """One proximal step; where more of the gap is outside of the working set, that is chosen anew."""
        enough = 0.5 * self.settings.rtol * abs(self._objective)
        self._move(self._sigma, enough)
        self._a[self._work.at] = self._work.a
        inside = self._look()
        self._sigma = max(self._sigma * SHRINK, SINGULAR * self._scale)
        if self.gap > self.settings.rtol and inside < 0.5:
            self._work, self._a = self._choose(self.bound, a=self._a)
            self._sigma = min(max(self._sigma, 2.0 * self._worst / self.bound), self._widest())
        return Reason.ITERATING

    def dual(self) -> float:
        """|Phi a|^2 / 2 - y'a."""
        return -self._objective

    def unsolved(self) -> SplitRecord:
        """What stands for a start without numbers."""
        return self.record(0)

    def remedy(self, reason: Reason) -> str:
        """What to try next."""
        return "raise -svm_max_it, or loosen -svm_rtol" if reason == Reason.DIVERGED_MAX_IT else ""

    def result(self, reason: Reason, message: str, history: History) -> Result:
        """a by points on each rank, with why the run ended."""
        return Result(np.concatenate(self.comm.allgather(self._a)), reason, message, history)

    def _start(self) -> None:
        """w and b from subsets of the samples, each of four times as many; a and the first working set of all."""
        n, own = self.factor.n, self.factor.own
        order = np.random.default_rng(self.settings.seed).permutation(n)
        for stride in (4**k for k in reversed(range(1, 20)) if n >= FEW * 4**k):
            rows = np.sort(order[: n // stride])
            rows = rows[(rows >= own.start) & (rows < own.stop)] - own.start
            if all(_total(self.comm, float(np.sum(self._y[rows] == sign))) for sign in (-1.0, 1.0)):
                self._work, _ = self._choose(stride * self.bound, rows)  # the same machine in the mean
                self._move(self._widest(stride), 0.0)
        self._sigma = self._widest()
        self._work, self._a = self._choose(self.bound)
        self._a[self._work.at] = self._work.a
        self._w = _total(self.comm, self.factor.phi @ self._a)
        self._look()

    def _widest(self, stride: int = 1) -> float:
        """The first sigma, for a subset of every stride-th sample."""
        zone = ZONE if self._newton else COARSE_ZONE
        return 2.0 * zone / (stride * min(self.bound, LARGE / self._scale))

    def _choose(self, bound: float, rows: Any = slice(None), a: Array | None = None) -> tuple[_WorkingSet, Array]:
        """The samples near the margin of present w and b; and a of all `rows`, by w and b where none are given."""
        phi, y, first = self.factor.phi[:, rows], self._y[rows], a is None
        short = 1.0 - y * (self._w @ phi + self.offset)
        a = bound * y * (short > 0.0) if a is None else a
        out = np.maximum(np.where(np.abs(a) < bound, short, 0.0), np.where(a != 0.0, -short, 0.0))
        self._worst = max(self.comm.allgather(float(out.max(initial=0.0))))
        reach = np.concatenate(self.comm.allgather(np.abs(short)))
        count = max(FEW, int(PART * len(reach)))
        if self._newton == 0 or count >= len(reach):
            near = np.full(len(y), True)
        else:
            near = (np.abs(short) <= np.partition(reach, count)[count]) | (out > 0.0)
        fixed = np.where(near, 0.0, a)
        total = _total(self.comm, float(fixed.sum()))
        limits = [_total(self.comm, bound * float(np.sum(near & (y == sign)))) for sign in (1.0, -1.0)]
        if not -limits[0] < total < limits[1]:  # the sum of the others cannot be made up for
            near, fixed, total = np.full(len(y), True), np.zeros(len(y)), 0.0
        at = np.flatnonzero(near)
        center = 0.5 * bound * min(1.0, LARGE / (self._scale * self.bound)) * y[at] if first else a[at]
        base = _total(self.comm, phi @ fixed)
        own = np.ascontiguousarray(phi[:, at])
        return _WorkingSet(self.comm, own, y[at], bound, center, base, total, at), a

    def _move(self, sigma: float, enough: float) -> None:
        """A proximal step of the working set."""
        self._w, self.offset, steps = self._work.step(self._w, self.offset, sigma, enough)
        self._newton += steps
        self._note = f"{int(_total(self.comm, float(len(self._work.at))))} samples, sigma {sigma:.0e}"

    def _look(self) -> float:
        """The gap of all samples at w = Phi a, a sum of terms >= 0; which part of it is in the working set."""
        short = 1.0 - self._y * (self._w @ self.factor.phi + self.offset)
        terms = self.bound * np.maximum(short, 0.0) - np.abs(self._a) * short
        inside = terms[self._work.at].sum()
        gap, inside, size = _total(self.comm, np.array([terms.sum(), inside, np.abs(self._a).sum()]))
        self._objective = float(size - 0.5 * self._w @ self._w)
        self.gap = float(gap) / max(abs(self._objective), LEAST)
        return float(inside / gap) if gap else 1.0


@dataclass
class _WorkingSet:
    """min |base + Phi a|^2 / 2 - y'a, 0 <= y_s a_s <= bound, sum a = -total: base and total are of the other samples.

    Attributes:
        a: the present point, and center of the next proximal step.
        at: where this rank's samples stand.
    """

    comm: Any
    phi: Array
    y: Array
    bound: float
    a: Array
    base: Array
    total: float
    at: Any

    def step(self, w: Array, b: float, sigma: float, enough: float) -> tuple[Array, float, int]:
        """Minimize with sigma |a - center|^2 / 2 added, by Newton's method in w, until the gap is `enough`. Collective.

        Returns:
            base + Phi a, b, and Newton steps.
        """
        center, g = self.a, w @ self.phi
        b, a, value = self._at(w, g, b, center, sigma)
        for steps in range(MOST_STEPS + 1):
            right = self.base + _total(self.comm, self.phi @ a) - w
            short = 1.0 - self.y * (g + b)
            sums = np.array(
                [np.sum(self.bound * np.maximum(short, 0.0) - np.abs(a) * short), np.sum((a - center) ** 2)]
            )
            gap, moved = _total(self.comm, sums)
            gap, size = float(gap + 0.5 * right @ right), float(np.linalg.norm(right))
            small = max(INEXACT * float(np.sqrt(sigma * moved)), 1e-11 * float(np.linalg.norm(w)))
            if gap <= enough or size <= small or steps == MOST_STEPS:
                break
            dw = self._direction(a, right, sigma)
            dg, slope, length = dw @ self.phi, float(right @ dw), 1.0
            while True:
                trial = w + length * dw, g + length * dg
                found = self._at(*trial, b, center, sigma)
                if found[2] <= value - 1e-4 * length * slope + 1e-13 * abs(value) or length < 1e-8:
                    break
                length *= 0.5
            (w, g), (b, a, value) = trial, found
        self.a = a
        return w + right, b, steps

    def _at(self, w: Array, g: Array, b: float, center: Array, sigma: float) -> tuple[float, Array, float]:
        """b with the right sum, a, and the function of w that is minimized."""
        low, high = np.minimum(0.0, self.bound * self.y), np.maximum(0.0, self.bound * self.y)
        right = center + (self.y - g) / sigma
        b, a = _balanced(self.comm, right, low, high, sigma, b, self.total)
        moved = a - center
        value = 0.5 * float(w @ w) - float(w @ self.base)
        return b, a, value - _total(self.comm, float(a @ (g - self.y) + 0.5 * sigma * (moved @ moved)))

    def _direction(self, a: Array, right: Array, sigma: float) -> Array:
        """(I + X X' / sigma)^-1 right, X the columns of free samples less their mean, as b moves with w."""
        free = (a != 0.0) & (np.abs(a) < self.bound)
        x = self.phi[:, free]
        count = _total(self.comm, float(x.shape[1]))
        if count == 0:
            return right
        x = x - (_total(self.comm, x.sum(axis=1)) / count)[:, None]
        if count > len(right):
            matrix = _total(self.comm, x @ x.T) / sigma
            matrix[np.diag_indices(len(right))] += 1.0
            return _solved(matrix, right)
        x = np.concatenate(self.comm.allgather(x), axis=1) if self.comm.size > 1 else x
        matrix = x.T @ x
        matrix[np.diag_indices(x.shape[1])] += sigma
        return right - x @ _solved(matrix, x.T @ right)


def _solved(matrix: Array, right: Array) -> Array:
    """Of a symmetric positive definite system."""
    found: Array = scipy.linalg.cho_solve(scipy.linalg.cho_factor(matrix, lower=True, check_finite=False), right)
    return found


def _balanced(
    comm: Any, right: Array, low: Array, high: Array, sigma: float, b: float, total: float
) -> tuple[float, Array]:
    """b, and a = right - b / sigma cut to its bounds, with sum a = -total, by Newton's method between two bounds."""
    left, end = -np.inf, np.inf
    rounding = ROUNDING * _total(comm, float((high - low).sum()))
    for _ in range(100):
        shifted = right - b / sigma
        a = np.minimum(np.maximum(shifted, low), high)
        excess, free = _total(comm, np.array([a.sum(), np.count_nonzero(a == shifted)]))
        excess += total
        if abs(excess) <= rounding:
            break
        left, end = (b, end) if excess > 0.0 else (left, b)
        new = b + sigma * excess / free if free else np.nan
        if not left < new < end:  # by halves; where there is no bound yet, by doubling
            is_between = np.isfinite(left) and np.isfinite(end)
            new = 0.5 * (left + end) if is_between else b + np.sign(excess) * max(1.0, 2.0 * abs(b))
        b = new
    return float(b), a


def _total(comm: Any, value: Any) -> Any:
    """Of all ranks."""
    return value if comm.size == 1 else comm.allreduce(value)


def labels_of(labels: Any, n: int) -> Array:
    """y, (n,), -1 or 1.

    Raises:
        InputError: other labels, of one class only, or of another number.
    """
    y = np.asarray(labels, dtype=float)
    if y.shape != (n,) or not np.array_equal(np.unique(y), [-1.0, 1.0]):
        raise InputError("labels of support vectors", f"{y.shape}, {np.unique(y)[:4]}", f"({n},) -1 and 1")
    return y
