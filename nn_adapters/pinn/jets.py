"""Jets: a value with its derivatives by the inputs, carried through the layers of a network, and back.

A layer takes z = W a + b and then a' = act(z), entry by entry. Along a first derivative i and a second one ij,

    a'_i = act'(z) z_i,    a'_ij = act'(z) z_ij + act''(z) z_i z_j,

so one product with W serves all derivatives at once. No graph is built: the backward pass is written out, and its cost
is that of a few more products. A jet is a tensor (J, width, points): value, first derivatives, second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from pdeopt.core.errors import InputError


@dataclass(frozen=True)
class JetBasis:
    """Which derivatives a jet has: a row each, the value first, then first and second derivatives, J in all.

    Args:
        names: of the inputs, a letter each, such as "xt".
        derivatives: those wanted, such as ("x", "t", "xx", "xt"); the first ones under a second one come along.

    Attributes:
        first: inputs of the rows 1, 2, ..., which are first derivatives.
        second: (i, j), inputs of the rows that follow.
        rows: row by name; "" is the value.

    Raises:
        InputError: a derivative of an unknown letter or of third order.

    Example:
        >>> JetBasis("xt", ("t", "xx")).rows
        {'': 0, 't': 2, 'xx': 3}
    """

    names: str
    derivatives: tuple[str, ...] = ()
    first: tuple[int, ...] = field(init=False)
    second: tuple[tuple[int, int], ...] = field(init=False)
    rows: dict[str, int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        inputs = range(len(self.names))
        legal = {self.names[i]: (i,) for i in inputs} | {
            self.names[i] + self.names[j]: (i, j) for i, j in combinations_with_replacement(inputs, 2)
        }
        wanted = {}
        for name in self.derivatives:
            if name not in legal and name[::-1] not in legal:
                raise InputError("derivative", repr(name), " | ".join(legal))
            wanted[name] = legal.get(name) or legal[name[::-1]]
        first = sorted({i for key in wanted.values() for i in key})
        second = sorted({key for key in wanted.values() if len(key) == 2})
        keys = [(), *((i,) for i in first), *second]
        rows = {name: keys.index(key) for name, key in wanted.items()}
        for attribute, value in (("first", tuple(first)), ("second", tuple(second)), ("rows", {"": 0} | rows)):
            object.__setattr__(self, attribute, value)

    def __len__(self) -> int:
        """J."""
        return 1 + len(self.first) + len(self.second)

    @property
    def products(self) -> list[tuple[int, int, int]]:
        """(row of ij, row of i, row of j) of each second derivative."""
        row = {i: 1 + number for number, i in enumerate(self.first)}
        return [(1 + len(self.first) + n, row[i], row[j]) for n, (i, j) in enumerate(self.second)]

    def of_inputs(self, x: Tensor, features: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The jets of what a network takes in at points x, (points, inputs): (J, inputs, points).

        Args:
            features: (points, inputs) -> (points, k), whose jets, (J, k, points), are taken instead of those of x.
        """
        if features is not None:
            return self.of_function(features, x).transpose(1, 2).contiguous()
        jets = x.new_zeros(len(self), x.shape[1], len(x))
        jets[0] = x.T
        for number, i in enumerate(self.first):
            jets[1 + number, i] = 1.0
        return jets

    def of_function(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The jets of a function at points x, (points, inputs): (J, points), or (J, points, k).

        Args:
            function: (points, inputs) -> (points,) or (points, k), made of torch operations; its rows do not interact.
        """
        units = torch.eye(x.shape[1], dtype=x.dtype)

        def along(f: Callable[[Tensor], Tensor], i: int) -> Callable[[Tensor], Tensor]:
            return lambda x: jvp(f, (x,), (units[i].expand_as(x),))[1]

        firsts = [along(function, i) for i in self.first]
        seconds = [along(along(function, i), j) for i, j in self.second]
        return torch.stack([f(x) for f in (function, *firsts, *seconds)])

    def multiplication(self, factor: Tensor) -> Tensor:
        """The matrices of the product rule, (J, J, points): jets of f g are the matrix of f times those of g.

        Args:
            factor: jets of f, (J, points).
        """
        size = len(self)
        matrices = factor.new_zeros(size, size, factor.shape[1])
        for row in range(size):
            matrices[row, 0] = factor[row]
            matrices[row, row] = factor[0]
        for row, i, j in self.products:
            matrices[row, i] += factor[j]
            matrices[row, j] += factor[i]
        return matrices


#: (z, a, s1, s2, s3): writes act(z) and its first three derivatives to the others.
Activation = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _tanh(z: Tensor, a: Tensor, s1: Tensor, s2: Tensor, s3: Tensor) -> None:
    """a; 1 - a^2; -2 a s1; (6 a^2 - 2) s1 = (4 - 6 s1) s1."""
    np.tanh(z.numpy(), out=a.numpy())  # three times as fast as torch's
    torch.mul(a, a, out=s1).neg_().add_(1.0)
    torch.mul(a, s1, out=s2).mul_(-2.0)
    torch.mul(s1, -6.0, out=s3).add_(4.0).mul_(s1)


def _sin(z: Tensor, a: Tensor, s1: Tensor, s2: Tensor, s3: Tensor) -> None:
    torch.sin(z, out=a)
    torch.cos(z, out=s1)
    torch.neg(a, out=s2)
    torch.neg(s1, out=s3)


JET_ACTIVATIONS: dict[str, Activation] = {"tanh": _tanh, "sin": _sin}


def _plain_tanh(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = torch.tanh(z)
    s1 = 1.0 - a * a
    return a, s1, -2.0 * a * s1


def _plain_sin(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = torch.sin(z)
    return a, torch.cos(z), -a


#: z -> act(z), act'(z), act''(z), for `torch.func` to differentiate.
TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "tanh": _plain_tanh,
    "sin": _plain_sin,
}


def activate_jets(basis: JetBasis, activation: str, z: Tensor) -> Tensor:
    """The jets of act(z), (J, width, points), from those of z, by operations that `torch.func` differentiates.

    Args:
        basis: rows of the jets.
        activation: one of `JET_ACTIVATIONS`.
        z: (J, width, points).
    """
    a, s1, s2 = TORCH_ACTIVATIONS[activation](z[0])
    rows = [a, *(s1 * row for row in z[1:])]
    for row, i, j in basis.products:
        rows[row] = rows[row] + s2 * z[i] * z[j]
    return torch.stack(rows)


class ActivatedLayer:
    """The jets of a = act(z), and the way back, in arrays that are made once.

    Args:
        basis: rows of the jets.
        activation: act.
        width, points: of a jet.

    Attributes:
        z: (J, width, points), to be filled before `forward`.
        a: (J, width, points), which `forward` fills.
    """

    def __init__(self, basis: JetBasis, activation: Activation, width: int, points: int) -> None:
        self.activation, self.products, self.firsts = activation, basis.products, len(basis.first)
        self.z, self.a = torch.empty(2, len(basis), width, points, dtype=torch.float64).unbind()
        self._slopes = torch.empty(3, width, points, dtype=torch.float64).unbind()
        self._scratch = torch.empty(width, points, dtype=torch.float64)
        self._z, self._a = self.z.unbind(), self.a.unbind()

    def forward(self) -> Tensor:
        """The jets a, (J, width, points), which the caller may change."""
        z, a, t = self._z, self._a, self._scratch
        s1, s2, _ = self._slopes
        self.activation(z[0], a[0], *self._slopes)
        for z_row, a_row in zip(z[1:], a[1:]):
            torch.mul(z_row, s1, out=a_row)
        for row, i, j in self.products:
            a[row].addcmul_(torch.mul(z[i], z[j], out=t), s2)
        return self.a

    def tangent(self, d: Tensor) -> Tensor:
        """The change of a, (J, width, points), to first order, for the change d of z, which is overwritten by it."""
        z, t, (s1, s2, s3) = self._z, self._scratch, self._slopes
        rows = d.unbind()
        for row, i, j in self.products:
            rows[row].mul_(s1).addcmul_(torch.mul(z[row], rows[0], out=t), s2)
            rows[row].addcmul_(torch.mul(z[i], rows[j], out=t).addcmul_(z[j], rows[i]), s2)
            rows[row].addcmul_(torch.mul(z[i], z[j], out=t).mul_(rows[0]), s3)
        for z_row, row_of_first in zip(z[1 : 1 + self.firsts], rows[1:]):
            row_of_first.mul_(s1).addcmul_(torch.mul(z_row, rows[0], out=t), s2)
        rows[0].mul_(s1)
        return d

    def back(self, w: Tensor, out: Tensor) -> Tensor:
        """The cotangent of z, (J, width, points), for the cotangent w of a; it is written to `out`."""
        z, t, (s1, s2, s3) = self._z, self._scratch, self._slopes
        torch.mul(w, s1, out=out)
        v, w_rows = out.unbind(), w.unbind()
        for z_row, w_row in zip(z[1:], w_rows[1:]):
            v[0].addcmul_(torch.mul(z_row, w_row, out=t), s2)
        for row, i, j in self.products:
            torch.mul(w_rows[row], s2, out=t)
            v[i].addcmul_(t, z[j])
            v[j].addcmul_(t, z[i])
            v[0].addcmul_(torch.mul(z[i], z[j], out=t).mul_(w_rows[row]), s3)
        return out
