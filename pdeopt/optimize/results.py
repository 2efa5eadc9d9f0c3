"""What `minimize` and `least_squares` return, by SciPy's names."""

from __future__ import annotations

from typing import Any


class NamedResult(dict[str, Any]):
    """A dictionary whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"{name!r}: the result has {', '.join(self)}")
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def __repr__(self) -> str:
        shown = {name: value for name, value in self.items() if name != "history"}
        width = max(map(len, shown), default=0)
        return "\n".join(f"{name:>{width}}: {value}" for name, value in shown.items())


class MinimizeResult(NamedResult):
    """What `minimize` found; `result.x` and `result["x"]` are the same.

    Attributes:
        x: the last point, (n,), of the kind and type of x0.
        fun: f there.
        jac: f' there, (n,), as x.
        nit: iterations.
        nfev, njev, nhev: values, gradients and Hessian products that were asked for.
        success: whether the tolerance was met.
        status: the `Reason` why it stopped; see there.
        message: the same in words.
        history: a `DescentRecord` an iteration; `history["objective"]` is a column.
    """


class LeastSquaresResult(NamedResult):
    """What `least_squares` found; `result.x` and `result["x"]` are the same.

    Attributes:
        x: the last point, (n,), of the kind and type of x0.
        cost: |r|^2 / 2 there.
        fun: r there, (m,), as x.
        jac: J there, (m, n), as x.
        grad: J'r, (n,), as x.
        optimality: its largest entry; with bounds that of x - P(x - J'r), P the projection onto them.
        active_mask: -1 where x is at its lowest value, 1 at its highest, else 0, (n,) integers of NumPy.
        nit: iterations.
        nfev, njev: calls of fun and of the Jacobian, differences of it not counted.
        success: whether a tolerance was met.
        status: the `Reason` why it stopped; see there.
        message: the same in words.
        history: a `LeastSquaresRecord` an iteration.
    """
