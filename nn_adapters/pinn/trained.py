"""A trained network as a function that another one begins from: for what is left, or from where its time ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nn_adapters.pinn.device import across
from nn_adapters.pinn.jets import JetBasis, JetField
from nn_adapters.pinn.network import absorb_slopes
from nn_adapters.pinn.terms import Ansatz, Term, TermAtPoints
from pdeopt.core.errors import InputError


class TrainedField(JetField):
    """u of a network with fixed parameters, as lift or factor of another network; its jets come from a sweep.

    It is evaluated where the points are, whatever device it was trained on.

    With `at` some inputs are fixed: u(x, 1) as a function of (x, t) are initial values for a network from t = 1 on.

    Args:
        ansatz: for u.
        theta: parameters, (size,), without coefficients.
        at: values of the inputs that are fixed, by their letters.

    Raises:
        InputError: letters that are no inputs.
    """

    def __init__(self, ansatz: Ansatz, theta: Tensor, at: Mapping[str, float] | None = None) -> None:
        self.ansatz, self.theta, self.at = ansatz, theta.clone(), dict(at or {})
        if set(self.at) - set(ansatz.names):
            raise InputError("inputs that are fixed", ", ".join(self.at), " | ".join(ansatz.names))

    def __call__(self, x: Tensor) -> Tensor:
        """u at points, (n, inputs): (n,), or (n, fields); by operations that `torch.func` differentiates."""
        ansatz, x = self.ansatz, self._moved(x)
        a = x if ansatz.features is None else ansatz.features(x)
        u = ansatz.network.jets(self.theta.to(x.device), JetBasis(ansatz.names), a.T[None])[0].T
        for function, is_factor in ((ansatz.factor, True), (ansatz.lift, False)):
            if function is not None:
                values = function(x)
                values = values[:, None] if values.ndim == 1 else values
                u = u * values if is_factor else u + values
        return u if ansatz.network.outputs > 1 else u[:, 0]

    def jets(self, basis: JetBasis, x: Tensor) -> Tensor:
        if basis.names != self.ansatz.names:
            raise InputError("inputs of a trained network", self.ansatz.names, basis.names)
        fixed = {self.ansatz.names.index(name) for name in self.at}
        free = {key: "".join(basis.names[i] for i in key) for key in basis.keys if not fixed & set(key)}
        ansatz, there = replace(self.ansatz, device=x.device), across(self.theta, x.device)
        term = TermAtPoints(ansatz, Term(self._moved(x), lambda u, d, x: u, tuple(filter(None, free.values()))))
        known = term.jets(absorb_slopes(ansatz.network.layers(self.theta, there=there)), there[:0])[1]
        found = known.new_zeros(len(basis), *known.shape[1:])
        for row, key in enumerate(basis.keys):
            if key in free:
                found[row] = known[term.basis.rows[free[key]]]
        return found.transpose(1, 2) if found.shape[1] > 1 else found[:, 0]

    def _moved(self, x: Tensor) -> Tensor:
        """Points with the inputs that are fixed."""
        columns = [
            torch.full_like(column, self.at[name]) if name in self.at else column
            for name, column in zip(self.ansatz.names, x.unbind(1))
        ]
        return torch.stack(columns, 1)
