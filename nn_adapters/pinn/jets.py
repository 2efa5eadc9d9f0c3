"""Jets: a value with its derivatives by the inputs, carried through the layers of a network, and back.

A layer takes z = W a + b and then a' = act(z), entry by entry. Along a first derivative i and a second one ij,

    a'_i = act'(z) z_i,    a'_ij = act'(z) z_ij + act''(z) z_i z_j,

and along any other one, a sum over the ways to cut its letters into blocks (Faa di Bruno): act of as many dashes as
there are blocks, times the derivatives of z along the blocks. So one product with W serves all derivatives at once. No
graph is built: the backward pass is written out, and its cost is that of a few more products. A jet is a tensor
(J, width, points): value, first derivatives, second derivatives, and so on up to fourth ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, combinations_with_replacement

import torch
from torch import Tensor
from torch.func import jvp

from nn_adapters.pinn.activations import Activation, Pointwise, derivatives
from pdeopt.core.errors import InputError

#: Of derivatives.
HIGHEST_ORDER = 4

#: A derivative: inputs by their numbers, ascending; () is the value.
Key = tuple[int, ...]


@dataclass(frozen=True)
class JetBasis:
    """Which derivatives a jet has: a row each, the value first, then first derivatives, second ones, ..., J in all.

    Args:
        names: of the inputs, a letter each, such as "xt".
        derivatives: those wanted, such as ("x", "t", "xx", "xt", "xxx"); those of lower order under them come along.

    Attributes:
        keys: inputs of each row's derivative, () for the value.
        rows: row by name; "" is the value.
        chain: (row, count, blocks): act(z) has in this row also act^(m)(z) times the product of z in m >= 2 rows,
            `blocks`, as often as the count says.
        leibniz: (row, i, j): f g has in this row f in row i times g in row j, once for each entry.

    Raises:
        InputError: a derivative of an unknown letter or of fifth order.

    Example:
        >>> JetBasis("xt", ("t", "xx")).rows
        {'': 0, 't': 2, 'xx': 3}
    """

    names: str
    derivatives: tuple[str, ...] = ()
    keys: tuple[Key, ...] = field(init=False)
    rows: dict[str, int] = field(init=False, compare=False)
    chain: tuple[tuple[int, int, tuple[int, ...]], ...] = field(init=False, compare=False)
    leibniz: tuple[tuple[int, int, int], ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        wanted = {}
        for name in self.derivatives:
            if not (set(name) <= set(self.names) and 1 <= len(name) <= HIGHEST_ORDER):
                words = [*self.names, *map("".join, combinations_with_replacement(self.names, 2))]
                legal = f"{' | '.join(words)} | ..., up to {HIGHEST_ORDER} letters"
                raise InputError("derivative", repr(name), legal)
            wanted[name] = tuple(sorted(self.names.index(letter) for letter in name))
        under = {part for key in wanted.values() for m in range(len(key) + 1) for part in combinations(key, m)}
        keys = sorted(under | {()}, key=lambda key: (len(key), key))
        row = {key: number for number, key in enumerate(keys)}
        chain = []
        for key in keys:
            ways = Counter(tuple(sorted(row[block] for block in way)) for way in _cut(key) if len(way) > 1)
            chain += [(row[key], count, blocks) for blocks, count in ways.items()]
        leibniz = [(row[key], row[left], row[right]) for key in keys for left, right in _halves(key)]
        rows = {"": 0} | {name: row[key] for name, key in wanted.items()}
        values = {"keys": tuple(keys), "rows": rows, "chain": tuple(chain), "leibniz": tuple(leibniz)}
        for attribute, value in values.items():
            object.__setattr__(self, attribute, value)

    def __len__(self) -> int:
        """J."""
        return len(self.keys)

    @property
    def first(self) -> tuple[int, ...]:
        """Inputs of the rows 1, 2, ..., which are first derivatives."""
        return tuple(key[0] for key in self.keys if len(key) == 1)

    @property
    def order(self) -> int:
        """Of the highest derivative."""
        return len(self.keys[-1])

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
        if isinstance(function, JetField):
            return function.jets(self, x)
        units = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)

        def along(f: Callable[[Tensor], Tensor], i: int) -> Callable[[Tensor], Tensor]:
            return lambda x: jvp(f, (x,), (units[i].expand_as(x),))[1]

        def derivative(key: Key) -> Callable[[Tensor], Tensor]:
            return along(derivative(key[:-1]), key[-1]) if key else function

        return torch.stack([derivative(key)(x) for key in self.keys])

    def multiplication(self, factor: Tensor) -> Tensor:
        """The matrices of the product rule, (J, J, ..., points): jets of f g are the matrix of f times those of g.

        Args:
            factor: jets of f, (J, ..., points).
        """
        matrices = factor.new_zeros(len(self), *factor.shape)
        for row, i, j in self.leibniz:
            matrices[row, j] += factor[i]
        return matrices


class JetField(ABC):
    """A function of points that knows its jets better than nested differentiation does."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """(points, inputs) -> (points,) or (points, k)."""

    @abstractmethod
    def jets(self, basis: JetBasis, x: Tensor) -> Tensor:
        """(J, points), or (J, points, k), at points x, (points, inputs)."""


def _cut(letters: Key) -> Iterator[list[Key]]:
    """All ways to cut letters, which count as different, into blocks."""
    if not letters:
        yield []
        return
    head = letters[:1]
    for way in _cut(letters[1:]):
        yield [head, *way]
        for number, block in enumerate(way):
            yield [*way[:number], head + block, *way[number + 1 :]]


def _halves(letters: Key) -> Iterator[tuple[Key, Key]]:
    """All ways to give letters, which count as different, to two factors."""
    for size in range(len(letters) + 1):
        for places in combinations(range(len(letters)), size):
            yield (
                tuple(letter for place, letter in enumerate(letters) if place in places),
                tuple(letter for place, letter in enumerate(letters) if place not in places),
            )


def activate_jets(basis: JetBasis, activation: str | Pointwise, z: Tensor) -> Tensor:
    """The jets of act(z), (J, width, points), from those of z, by operations that `torch.func` differentiates.

    Args:
        basis: rows of the jets.
        activation: act, by name or as a function.
        z: (J, width, points).
    """
    a, *slopes = derivatives(activation, z[0], basis.order)
    rows = [a, *(slopes[0] * row for row in z[1:])]
    for row, count, blocks in basis.chain:
        rows[row] = rows[row] + count * slopes[len(blocks) - 1] * torch.stack([z[i] for i in blocks]).prod(0)
    return torch.stack(rows)


class ActivatedLayer:
    """The jets of a = act(z), and the way back, in arrays that are made once.

    Args:
        basis: rows of the jets.
        activation: act.
        width, points: of a jet.
        device: of the arrays.

    Attributes:
        z: (J, width, points), to be filled before `forward`.
        a: (J, width, points), which `forward` fills.
    """

    def __init__(
        self, basis: JetBasis, activation: Activation, width: int, points: int, device: torch.device | None = None
    ) -> None:
        self.activation, self.chain = activation, basis.chain
        make = partial(torch.empty, dtype=torch.float64, device=device)
        self.z, self.a = make(2, len(basis), width, points).unbind()
        self._slopes = make(max(basis.order, 1) + 1, width, points).unbind()
        self._scratch, self._second = make(2, width, points).unbind()
        self._z, self._a = self.z.unbind(), self.a.unbind()

    def forward(self) -> Tensor:
        """The jets a, (J, width, points), which the caller may change."""
        z, a, s = self._z, self._a, self._slopes
        self.activation(z[0], a[0], *s)
        for z_row, a_row in zip(z[1:], a[1:]):
            torch.mul(z_row, s[0], out=a_row)
        for row, count, blocks in self.chain:
            a[row].addcmul_(self._product(blocks, self._scratch), s[len(blocks) - 1], value=count)
        return self.a

    def tangent(self, d: Tensor) -> Tensor:
        """The change of a, (J, width, points), to first order, for the change d of z, which is overwritten by it."""
        z, t, s, rows = self._z, self._scratch, self._slopes, d.unbind()
        for row in reversed(range(1, len(rows))):  # each needs those of lower order as they were
            rows[row].mul_(s[0]).addcmul_(torch.mul(z[row], rows[0], out=t), s[1])
            for _, count, blocks in (link for link in self.chain if link[0] == row):
                m = len(blocks)
                for number, block in enumerate(blocks):
                    others = self._product(blocks[:number] + blocks[number + 1 :], self._second)
                    rows[row].addcmul_(torch.mul(others, rows[block], out=t), s[m - 1], value=count)
                rows[row].addcmul_(torch.mul(self._product(blocks, t), rows[0], out=t), s[m], value=count)
        rows[0].mul_(s[0])
        return d

    def back(self, w: Tensor, out: Tensor) -> Tensor:
        """The cotangent of z, (J, width, points), for the cotangent w of a; it is written to `out`."""
        z, t, s = self._z, self._scratch, self._slopes
        torch.mul(w, s[0], out=out)
        v, w_rows = out.unbind(), w.unbind()
        for z_row, w_row in zip(z[1:], w_rows[1:]):
            v[0].addcmul_(torch.mul(z_row, w_row, out=t), s[1])
        for row, count, blocks in self.chain:
            m = len(blocks)
            torch.mul(w_rows[row], s[m - 1], out=t)
            for number, block in enumerate(blocks):
                others = self._product(blocks[:number] + blocks[number + 1 :], self._second)
                v[block].addcmul_(t, others, value=count)
            v[0].addcmul_(torch.mul(self._product(blocks, t), w_rows[row], out=t), s[m], value=count)
        return out

    def _product(self, rows: tuple[int, ...], out: Tensor) -> Tensor:
        """That of z in some rows: in `out`, or of a single row z itself."""
        z = self._z
        if len(rows) == 1:
            return z[rows[0]]
        torch.mul(z[rows[0]], z[rows[1]], out=out)
        for row in rows[2:]:
            out.mul_(z[row])
        return out
