"""Forms of a step, compiled: vectors and sparse matrices over its unknowns, evaluated for batches of steps.

A form that depends on the point of a step is assembled once a step; one that depends on time and parameters alone once
for all steps of the same length and time, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError
from pdeopt.space.entries import SharedEntries
from pdeopt.space.fenicsx import AssembledMatrix, compiled, packages, scalar, vector
from pdeopt.space.steppoint import POINT, Field, StepPoint
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.timegrid import Steps

#: Batches of steps whose values are kept: those of windows and coarser grids among them.
KEPT_BATCHES = 8


class StepForm:
    """A compiled form of a step: its entries, in a fixed order, at what the functions hold.

    Args:
        form: of UFL, with derivatives; one that vanishes is not compiled.
        point: what it depends on.
        rows, columns: the fields of its test and trial function; none for a functional.
        whole: the entries are those of owned rows, sums of what the ranks that share a mesh find; else those that this
            rank has over its own cells, of all unknowns that it sees. Numbers are those of this rank always.

    Attributes:
        depends: names of what it depends on, as `StepPoint.names` has them.
        sparsity: of a bilinear form, over the unknowns of its fields.

    Raises:
        InputError: integrals over interior facets on a mesh that ranks share.
    """

    def __init__(
        self, form: Any, point: StepPoint, rows: Field | None = None, columns: Field | None = None, whole: bool = True
    ) -> None:
        self.point, self.rows, self.columns, self._whole = point, rows, columns, whole
        self._shared: SharedEntries | None = None
        self.is_zero = packages().expand(form).empty()
        if point.is_shared and any(part.integral_type() == "interior_facet" for part in form.integrals()):
            legal = "integrals over cells and the boundary, or a mesh made with MPI.COMM_SELF and space_ranks 1"
            raise InputError("form", "an integral over interior facets, dS, on a mesh of several ranks", legal)
        self.depends = frozenset() if self.is_zero else point.names(form)
        self._form = None if self.is_zero else compiled(form)
        self._kept: dict[bytes, Tensor] = {}
        self._matrix: AssembledMatrix | None = None
        if rows is not None and columns is not None:
            self._of_fields(rows, columns)

    def _of_fields(self, rows: Field, columns: Field) -> None:
        """Which entries of the assembled matrix are those of unknowns."""
        layout, num_rows = columns.layout, rows.layout.n_owned if self._whole else rows.layout.n_all
        if self.is_zero:
            nothing = sp.csr_matrix((num_rows, layout.n_all))
            self.sparsity = Sparsity(nothing, layout if self._whole else None)
            return
        self._matrix = AssembledMatrix(self._form, (rows.function.function_space, columns.function.function_space))
        numbered = self._matrix.pattern
        numbered.data = np.arange(1.0, numbered.nnz + 1)
        inner = sp.csr_matrix(numbered[rows.dofs][:, columns.dofs])
        inner.sort_indices()
        self._entries = inner.data.astype(np.int64) - 1
        inner.resize(rows.layout.n_all, layout.n_all)
        if self._whole and self.point.is_shared:
            self._shared = SharedEntries(rows.layout, layout, inner)
        self.sparsity = Sparsity(inner) if self._shared is None else self._shared.sparsity

    def values(self) -> Tensor:
        """The entries at what the functions hold: those of `sparsity`, (nnz,), of the owned rows, or one number, (1,).

        Collective where ranks share the mesh.
        """
        return self.gathered(torch.from_numpy(self.own_values())[None])[0]

    def own_values(self) -> Array:
        """What this rank has of the entries."""
        if self._matrix is not None:
            entries: Array = self._matrix.values()[self._entries]
            return entries
        if self.is_zero:
            return np.zeros(len(self.rows) if self.rows is not None and self.columns is None else 0)
        if self.rows is None:
            return np.array([scalar(self._form)])
        of_rows: Array = vector(self._form, self.rows.size)[self.rows.dofs]
        return of_rows

    def gathered(self, values: Tensor) -> Tensor:
        """What ranks have of the entries of a batch of steps, summed for the owners of rows: one message. Collective.

        Args:
            values: of steps, (batch, own values); numbers of functionals stay parts of a sum over ranks.
        """
        if self._shared is not None:
            return self._shared.collect(values)
        if self.rows is None or self.columns is not None or not self.point.is_shared:
            return values
        layout = self.rows.layout
        return layout.collect(torch.nn.functional.pad(values, (0, layout.n_all - values.shape[1])))

    def at_times(self, steps: Steps) -> Tensor:
        """The entries at a point of zeros, (batch, k), or (1, k) where all steps have the same; kept."""
        name = self.name(steps)
        if name not in self._kept:
            if len(self._kept) >= KEPT_BATCHES:
                self._kept.pop(next(iter(self._kept)))
            self._kept[name] = self._at_times(steps)
        return self._kept[name]

    def name(self, steps: Steps) -> bytes:
        """The same for steps at which `at_times` is."""
        times = self._times(steps).tobytes()
        return times + steps.p.detach().numpy().tobytes() if "p" in self.depends else times

    def _at_times(self, steps: Steps) -> Tensor:
        key = self._times(steps)
        different, first, place = np.unique(key, axis=0, return_index=True, return_inverse=True)
        self.point.set_parameters(steps.p)
        values = []
        for k, (t_old, t_new, dt) in zip(first, different):
            if "t" not in self.depends:
                t_old, t_new = float(steps.t_old[k]), float(steps.t_new[k])
            g_old, g_new = self.point.set_time(float(t_old), float(t_new), float(dt))
            for field, others in ((self.point.old, g_old), (self.point.new, g_new)):
                field.set(np.zeros(len(field)), others)
            if self.point.z is not None:
                self.point.z.set(np.zeros(len(self.point.z)))
            values.append(self.own_values())
        found = self.gathered(torch.from_numpy(np.stack(values)))
        return found if len(found) == 1 else found[torch.from_numpy(place.ravel())]

    def _times(self, steps: Steps) -> Array:
        """What a batch has of (t_old, t_new, dt) that matters, (batch, 3)."""
        columns = [torch.zeros_like(steps.dt)] * 3
        if "dt" in self.depends:
            columns[2] = steps.lengths.expand(len(steps))
        if "t" in self.depends:
            columns[:2] = steps.t_old, steps.t_new
        return torch.stack(columns, dim=1).numpy()


def evaluate(
    forms: Sequence[StepForm], point: tuple[Tensor, Tensor, Tensor], steps: Steps, lam: Tensor | None = None
) -> list[Tensor]:
    """The entries of forms of one `StepPoint` at each step, (batch, k), or (1, k) where all steps have the same.

    Args:
        forms: whose entries are wanted.
        point: u_old (batch, n), u_new (batch, n), z (batch, m), with ghosts.
        steps: the steps, with the global parameters.
        lam: multipliers, (batch, n), with ghosts, where a form has them.
    """
    by_step = [form for form in forms if form.depends & POINT]
    found = {id(form): form.at_times(steps) for form in forms if not form.depends & POINT}
    if by_step:
        at = by_step[0].point
        at.set_parameters(steps.p)
        rows = tuple(x.detach().numpy() for x in point)
        weights = None if lam is None else lam.detach().numpy()
        values = []
        for k in range(len(steps)):
            at.set_step(steps, k, rows, weights)  # type: ignore[arg-type]
            values.append([form.own_values() for form in by_step])
        for form, entries in zip(by_step, zip(*values)):
            found[id(form)] = form.gathered(torch.from_numpy(np.stack(entries)))
    return [found[id(form)] for form in forms]


class BlockForm:
    """A sparse matrix over several fields whose blocks are forms.

    Args:
        shape: (rows, columns).
        blocks: forms with the row and the column where they begin.
        mirrored: blocks below the diagonal are the transposes of those above, which alone are given.
    """

    def __init__(
        self, shape: tuple[int, int], blocks: Sequence[tuple[StepForm, int, int]], mirrored: bool = False
    ) -> None:
        kept = [(form, row, col) for form, row, col in blocks if form.sparsity.nnz]
        self.forms = [form for form, _, _ in kept]
        places = []
        for form, row, col in kept:
            rows, cols = form.sparsity.rows + row, form.sparsity.cols + col
            places.append([rows * shape[1] + cols] + ([cols * shape[1] + rows] if mirrored and row != col else []))
        keys = np.unique(np.concatenate([np.array([], dtype=np.int64), *(key for each in places for key in each)]))
        self.sparsity = Sparsity(sp.csr_matrix((np.ones(len(keys)), np.divmod(keys, shape[1])), shape=shape))
        self._places = [[torch.from_numpy(np.searchsorted(keys, key)) for key in each] for each in places]

    def values(self, entries: Sequence[Tensor]) -> Tensor:
        """Entries of the whole, (batch, nnz), of those of `forms`; (1, nnz) where all steps have the same."""
        out = torch.zeros(max((len(part) for part in entries), default=1), self.sparsity.nnz, dtype=torch.float64)
        for part, places in zip(entries, self._places):
            for place in places:
                out[:, place] = part.expand(len(out), -1)
        return out
