"""What the forms of a step see: functions, and the constants of time, set to one step after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.space.fenicsx import packages, set_fixed
from pdeopt.space.layouts.layout import Layout
from pdeopt.space.unknowns import Unknowns
from pdeopt.steps.timegrid import Steps

#: Names of what differs from step to step for one linearization; a form with none of them depends on time and p alone.
POINT = frozenset({"u_old", "u_new", "z", "lam"})


class Field:
    """A function and those of its coefficients that are unknowns of a step.

    Args:
        function: of DOLFINx.
        unknowns: of its space.

    Attributes:
        size: coefficients that this rank has.
        layout: of the unknowns.
    """

    def __init__(self, function: Any, unknowns: Unknowns) -> None:
        self.function, self.size, self._unknowns = function, unknowns.size, unknowns

    @property
    def layout(self) -> Layout:
        return self._unknowns.layout

    @property
    def dofs(self) -> Array:
        """Numbers of the unknowns among the coefficients of this rank, owned ones before ghosts."""
        return self._unknowns.dofs

    @property
    def owned(self) -> Array:
        """Numbers of those that this rank owns."""
        return self.dofs[: self.layout.n_owned]

    def __len__(self) -> int:
        """Unknowns that functions of this rank have, ghosts among them."""
        return len(self.dofs)

    def choose(self, is_unknown: Array) -> None:
        """Take these of the owned coefficients as unknowns. Collective."""
        self._unknowns.choose(is_unknown)

    def set(self, row: Array, others: Array | float = 0.0) -> None:
        """Write unknowns, owned ones and ghosts, over values of all coefficients, (size,)."""
        values = self.function.x.array
        values[:] = others
        values[self.dofs] = row[: len(self.dofs)]


class StepPoint:
    """Functions and constants that the forms of a step depend on. All forms of a constraint share it.

    Args:
        u_old, u_new, z, lam: functions; z is None where there is no control. lam is the multiplier.
        p: functions of global parameters.
        dt, t: constants of the length and the end of a step; t is None where nothing asks for it.
        bcs: Dirichlet conditions of the state.
        at_time: t -> None, sets what else depends on time: coefficients of forms, values of conditions.

    Attributes:
        old, new, lam: their fields, without what conditions fix.
        z: the field of the control, whose unknowns are chosen later.
        p: the fields of the parameters, one after the other in `steps.p`.
        is_shared: whether several ranks share the mesh.
    """

    def __init__(
        self,
        u_old: Any,
        u_new: Any,
        z: Any,
        lam: Any,
        p: Sequence[Any],
        dt: Any,
        t: Any,
        bcs: Sequence[Any],
        at_time: Callable[[float], Any] | None,
    ) -> None:
        self._dt, self._t, self._bcs, self._at_time = dt, t, bcs, at_time
        of_states = Unknowns(u_new.function_space)
        of_states.exclude(bcs)
        self.old, self.new, self.lam = (Field(f, of_states) for f in (u_old, u_new, lam))
        rows = (u_new.function_space,)  # of matrices, beside those of masses
        self.z = None if z is None else Field(z, Unknowns(z.function_space, rows))
        self.p = [Field(f, Unknowns(f.function_space)) for f in p]
        self.is_shared = of_states.layout.mpi.size > 1
        self._names = [(u_old, "u_old"), (u_new, "u_new"), (z, "z"), (lam, "lam"), *((f, "p") for f in p)]
        self._values = np.zeros(of_states.size)

    @property
    def controls(self) -> Layout:
        """The layout of the controls, an empty one where there are none."""
        return Layout(self.new.layout.mpi, 0) if self.z is None else self.z.layout

    def names(self, form: Any) -> frozenset[str]:
        """What a form depends on: u_old, u_new, z, lam, p, dt and t, as far as its expanded derivatives have them."""
        expanded = packages().expand(form)
        found = set()
        for coefficient in expanded.coefficients():
            name = next((name for f, name in self._names if f is coefficient), None)
            if name is not None:
                found.add(name)
            elif self._at_time is not None:  # which may set it
                found.add("t")
        for constant in expanded.constants():
            found |= {name for c, name in ((self._dt, "dt"), (self._t, "t")) if c is constant}
        if self._at_time is not None and self._bcs and found & {"u_old", "u_new"}:
            found.add("t")
        return frozenset(found)

    def set_parameters(self, p: Tensor) -> None:
        """Write the global parameters, (param_dim,)."""
        values, start = p.detach().numpy(), 0
        for field in self.p:
            field.set(values[start : start + len(field)])
            start += len(field)

    def set_time(self, t_old: float, t_new: float, dt: float) -> tuple[Array | float, Array | float]:
        """Write the constants of a step; returns what conditions say of all coefficients at its two ends."""
        self._dt.value = dt
        if self._t is not None:
            self._t.value = t_new
        return self.boundary(t_old), self.boundary(t_new)

    def boundary(self, t: float) -> Array | float:
        """Values of all coefficients of a state at a time: those that conditions fix, zeros elsewhere."""
        if self._at_time is not None:
            self._at_time(t)
        if not self._bcs:
            return 0.0
        self._values[:] = 0.0
        set_fixed(self._bcs, self._values)
        return self._values.copy()

    def set_step(self, steps: Steps, k: int, rows: tuple[Array, Array, Array], lam: Array | None = None) -> None:
        """Write step k of a batch: rows of u_old, u_new, z and of the multiplier, with ghosts."""
        g_old, g_new = self.set_time(float(steps.t_old[k]), float(steps.t_new[k]), float(steps.dt[k]))
        u_old, u_new, z = rows
        self.old.set(u_old[k], g_old)
        self.new.set(u_new[k], g_new)
        if self.z is not None:
            self.z.set(z[k])
        if lam is not None:
            self.lam.set(lam[k])
