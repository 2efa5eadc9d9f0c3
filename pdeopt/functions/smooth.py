"""Smooth functions of many unknowns, as optimizers see them: values, gradients, Hessian products, all counted.

Unknowns are flat tensors. Those of a control problem are distributed over the ranks of `comm`; those of a network
are on every rank, and `comm` is then COMM_SELF.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from mpi4py import MPI
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.functions import differences
from pdeopt.functions.checked import CheckedFunction
from pdeopt.functions.decomposition import Decomposition

#: A linear map of vectors of unknowns.
Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Costs:
    """What a call costs, in evaluations of the whole function with its gradient.

    Attributes:
        value, gradient, hessian_product: of any function.
        jacobian, product: of a sum of squares: its residuals with their Jacobian, and a product with J or J'.
        multiplication: of dense matrices, where a method makes its own; 0 where nobody knows.
    """

    value: float = 1 / 3
    gradient: float = 1.0
    hessian_product: float = 2.0
    jacobian: float = 4.0
    product: float = 1.0
    multiplication: float = 0.0

    def times(self, share: float) -> Costs:
        """The costs of a part of the work; a multiplication is none."""
        scaled = {name: share * cost for name, cost in asdict(self).items() if name != "multiplication"}
        return replace(self, **scaled)


@dataclass
class Tally:
    """Calls so far; `work` weighs them by `Costs`, in equivalents of full gradients.

    Attributes:
        values: of the function alone.
        gradients: with or without the value.
        hessian_products: Hessian times vector.
        work: the sum of all costs.
        jacobians, products: of sums of squares.
    """

    values: int = 0
    gradients: int = 0
    hessian_products: int = 0
    work: float = 0.0
    jacobians: int = 0
    products: int = 0

    def __sub__(self, other: Tally) -> Tally:
        return Tally(*(a - b for a, b in zip(asdict(self).values(), asdict(other).values())))

    def add(self, other: Tally) -> None:
        """Count the calls of another tally here, too."""
        for name, amount in asdict(other).items():
            setattr(self, name, getattr(self, name) + amount)

    def set(self, other: Tally) -> None:
        """Take the state of another tally."""
        for name, amount in asdict(other).items():
            setattr(self, name, amount)

    def copy(self) -> Tally:
        """The present state."""
        return Tally(**asdict(self))


class Metric(Protocol):
    """An inner product u.Mv = (R u).(R v) of the unknowns, which may follow the point: a Riesz map.

    In the coordinates w = R v it is the Euclidean one; gradients there are R^-T g. Trust-region methods measure their
    steps in the one that a function supplies as `metric`. All vectors are (size,).
    """

    def refresh(self, function: SmoothFunction, x: Tensor) -> None:
        """Take in the function, or a batch of it, at x."""

    def root(self, v: Tensor) -> Tensor:
        """R v."""

    def root_solve(self, w: Tensor) -> Tensor:
        """R^-1 w."""

    def adjoint(self, w: Tensor) -> Tensor:
        """R' w."""

    def adjoint_solve(self, g: Tensor) -> Tensor:
        """R^-T g."""

    def local(self, indices: Tensor) -> Metric:
        """That of some of the unknowns, int64; raises `InputError` where it couples them with others."""

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""


class SmoothFunction(CheckedFunction):
    """f: R^n -> R, as all optimizers of pdeopt see it.

    A subclass writes `_value_and_gradient`; `_value` and `_hvp` where they cost less or are needed::

        class Quadratic(SmoothFunction):                        # x.A x / 2 - b.x
            def __init__(self, A, b):
                super().__init__(len(b))
                self.A, self.b = A, b

            def _value_and_gradient(self, x):
                return float(x @ (0.5 * self.A @ x - self.b)), self.A @ x - self.b

        LBFGS(Quadratic(A, b), gtol=1e-10).minimize(torch.zeros(len(b), dtype=torch.float64))

    Users call `value`, `value_and_gradient` and `hvp`, which count in `tally` and weigh by `costs`; the methods with an
    underscore do the work and count nothing. All vectors are flat tensors (size,) of double precision, the unknowns of
    this rank; inner products sum over the ranks, and all calls are collective over `comm`. A subclass may return
    values and gradients of NumPy, lists, or single precision: they are converted, and what is no vector of `size` real
    numbers is an `InputError`. Optimizers that split the unknowns ask `local` and `decompose`, those that precondition
    `preconditioner`: each has a default that serves. `verify` compares the derivatives with differences.

    A point without a value is no error: f is then infinite or NaN there, and optimizers step back. `SolveFailure` ends
    a run with its reason.

    Args:
        size: unknowns on this rank, >= 0.
        comm: mpi4py communicator of the ranks over which the unknowns are distributed; COMM_SELF where every rank has
            all of them.
        costs: of the calls, in evaluations of the whole function with its gradient.
        tally: where they are counted; a new one by default. Functions that are parts of each other share one.
    """

    def __init__(
        self, size: int, comm: Any = MPI.COMM_SELF, costs: Costs | None = None, tally: Tally | None = None
    ) -> None:
        self.size, self.comm = size, comm
        self.costs, self.tally = costs or Costs(), tally or Tally()

    def value(self, x: Tensor) -> float:
        """f(x), x (size,). Collective over `comm`, as all calls."""
        self.tally.values += 1
        self.tally.work += self.costs.value
        return self.evaluate_value(x)

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """f(x) and f'(x), (size,)."""
        self.tally.gradients += 1
        self.tally.work += self.costs.gradient
        return self.evaluate(x)

    def hvp(self, x: Tensor, d: Tensor) -> Tensor:
        """f''(x) d, (size,).

        Raises:
            InputError: a function without Hessian products.
        """
        self.tally.hessian_products += 1
        self.tally.work += self.costs.hessian_product
        return self.evaluate_hvp(x, d)

    def verify(self, x: Tensor, seed: int = 0) -> dict[str, float]:
        """Compare gradient and Hessian products at x with differences along a random direction. Collective.

        Args:
            x: (size,), where f is smooth.
            seed: of the direction.

        Returns:
            Relative errors by the names "gradient" and, where there are products, "hessian"; about 1e-8.

        Raises:
            DerivativeError: an error above 1e-5, beyond what rounding errors of f explain.
        """
        return differences.verify(self, x, seed)

    def local(self, decomposition: Decomposition, part: int, x: Tensor) -> SmoothFunction:
        """d -> f(x + R' d), R the restriction to a part of the unknowns; counted with the costs it has.

        It may be a model of it, with the same value and gradient at d = 0. Functions that know more evaluate only
        what depends on the part, and say so in the costs.

        Args:
            part: its number in the decomposition.
            x: (size,), where the other unknowns stay.

        Returns:
            a function of the part's unknowns on this rank, `len(decomposition.parts[part])` of them.
        """
        return Restriction(self, decomposition.parts[part], x)

    def decompose(self, parts: int | None = None, overlap: int = 0, team: Any = None) -> Decomposition:
        """The unknowns in parts of neighbors; functions that know better take whole layers, windows of time, ...

        Args:
            parts: how many; None for `DEFAULT_PARTS`, or as many as there can be where that is fewer.
            overlap: unknowns (layers, steps) that a part takes from each neighbor.
            team: ranks that share the parts, where the unknowns are on every rank.

        Raises:
            InputError: more parts than there are unknowns (layers, steps).
        """
        return Decomposition.even(self.size, parts, overlap, self.comm, team)

    def preconditioner(self) -> Operator | None:
        """g -> H_0 g, (size,) each: a positive definite inverse of the Hessian as far as it is known beforehand.

        Quasi-Newton methods start from it. None where nothing is known.
        """
        return None

    def metric(self, kind: str) -> Metric:
        """The inner product of this kind, in which steps are measured; `kind` as in `-tr_metric`.

        Raises:
            InputError: a function that has none.
        """
        raise InputError(f"metric {kind} of {type(self).__name__}", "none", "none, or a function that defines it")

    def products(self, rows: Tensor | Sequence[Tensor], x: Tensor) -> Tensor:
        """Inner products of several vectors, (m, size), with x, in one message: (m,)."""
        rows = rows if isinstance(rows, Tensor) else torch.stack(tuple(rows))
        return self.sum(rows @ x)

    def dot(self, a: Tensor, b: Tensor) -> float:
        """a.b over all ranks."""
        return float(self.sum(torch.dot(a, b)))

    def norm(self, a: Tensor) -> float:
        """|a| over all ranks, also where squares of the entries are too large or too small for a number."""
        square = self.dot(a, a)
        if 1e-250 < square < 1e250 or math.isnan(square):
            return math.sqrt(square)
        largest = float(a.abs().max()) if len(a) else 0.0
        largest = largest if self.comm.size == 1 else max(self.comm.allgather(largest))
        a = a / largest if 0.0 < largest < math.inf else a
        return largest * math.sqrt(self.dot(a, a)) if 0.0 < largest < math.inf else largest

    def sum(self, own: Tensor) -> Tensor:
        """The sum of the ranks' tensors."""
        return own if self.comm.size == 1 else torch.as_tensor(self.comm.allreduce(own.numpy()))


class Restriction(SmoothFunction):
    """d -> f(x + R' d) by evaluations of the whole f.

    Args:
        whole: f.
        indices: of the unknowns on this rank that are free, int64.
        x: where the others stay.
    """

    def __init__(self, whole: SmoothFunction, indices: Tensor, x: Tensor) -> None:
        super().__init__(len(indices), whole.comm, whole.costs, whole.tally)
        self.whole, self.indices, self.x = whole, indices, x

    def _at(self, d: Tensor) -> Tensor:
        return self.x.index_add(0, self.indices, d)

    def _value(self, x: Tensor) -> float:
        return self.whole.evaluate_value(self._at(x))

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        value, gradient = self.whole.evaluate(self._at(x))
        return value, gradient[self.indices]

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        direction = torch.zeros_like(self.x).index_copy(0, self.indices, d)
        return self.whole.evaluate_hvp(self._at(x), direction)[self.indices]


class ScaledFunction(SmoothFunction):
    """y -> f(y / scale): where scale^2 is the diagonal of a metric, Euclidean products of y are products of the metric.

    Args:
        whole: f.
        scale: positive, (size,).
    """

    def __init__(self, whole: SmoothFunction, scale: Tensor) -> None:
        super().__init__(whole.size, whole.comm, whole.costs, whole.tally)
        self.whole, self.scale = whole, scale

    def _value(self, x: Tensor) -> float:
        return self.whole.evaluate_value(x / self.scale)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        value, gradient = self.whole.evaluate(x / self.scale)
        return value, gradient / self.scale

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        return self.whole.evaluate_hvp(x / self.scale, d / self.scale) / self.scale

    def local(self, decomposition: Decomposition, part: int, x: Tensor) -> SmoothFunction:
        local = self.whole.local(decomposition, part, x / self.scale)
        return ScaledFunction(local, self.scale[decomposition.parts[part]])

    def decompose(self, parts: int | None = None, overlap: int = 0, team: Any = None) -> Decomposition:
        return self.whole.decompose(parts, overlap, team)

    def preconditioner(self) -> Operator | None:
        inverse, scale = self.whole.preconditioner(), self.scale
        return None if inverse is None else lambda g: inverse(g * scale) * scale


class SampledFunction(SmoothFunction):
    """f(x) = (1/N) sum_i f_i(x) + r(x): a mean over samples, of which subsets are functions of the same unknowns.

    Args:
        samples: N.
    """

    def __init__(
        self, size: int, samples: int, comm: Any = MPI.COMM_SELF, costs: Costs | None = None, tally: Tally | None = None
    ) -> None:
        super().__init__(size, comm, costs, tally)
        self.samples = samples

    @abstractmethod
    def subset(self, indices: Tensor) -> SampledFunction:
        """The mean over these samples, int64, with the same r, the same tally, and costs by its part of the samples."""


class FirstOrderConsistent(SmoothFunction):
    """d -> model(d) + <g - model'(d0), d - d0>: a model whose gradient at d0 is g.

    The additive first-order correction of multilevel and domain decomposition methods (S. G. Nash, A multigrid
    approach to discretized optimization problems, Optim. Methods Softw. 14, 2000).

    Args:
        model: any smooth function.
        d0: the point of consistency.
        g: the gradient wanted there.
        model_gradient: model'(d0) where it is known; else it is evaluated, once.
    """

    def __init__(self, model: SmoothFunction, d0: Tensor, g: Tensor, model_gradient: Tensor | None = None) -> None:
        super().__init__(model.size, model.comm, model.costs, model.tally)
        self.model, self.d0 = model, d0
        self.shift = g - (model.value_and_gradient(d0)[1] if model_gradient is None else model_gradient)

    def _value(self, x: Tensor) -> float:
        return self.model.evaluate_value(x) + self.dot(self.shift, x - self.d0)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        value, gradient = self.model.evaluate(x)
        return value + self.dot(self.shift, x - self.d0), gradient + self.shift

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        return self.model.evaluate_hvp(x, d)

    def preconditioner(self) -> Operator | None:
        return self.model.preconditioner()
