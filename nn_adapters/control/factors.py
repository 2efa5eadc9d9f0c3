"""Kronecker factors of all dense layers of a network at once, as a preconditioner of Gauss-Newton systems."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.functions.curved import CurvatureFactors
from pdeopt.functions.smooth import Operator
from pdeopt.lowrank.kroneckerbatches import FactorPair, KroneckerBatches


class DenseFactors(CurvatureFactors):
    """E aa' and the sum over samples of gg' of each layer [W | b]: G (x) A, in eigenvectors (`KroneckerBatches`).

    Args:
        network: a `DenseNetwork`.
        pairs: those of the layers of this rank, and on the first rank those of opening and head.
    """

    def __init__(self, network: Any, pairs: list[FactorPair]) -> None:
        self.network, self.batches = network, KroneckerBatches(pairs)
        self.shapes = [(len(A), G.shape[1], A.shape[1]) for A, G in pairs]

    def inverse(self, damping: float) -> Operator:
        terms = self.network.terms
        shifts = [damping + terms.layers, *(damping + terms.ends for _ in self.shapes[1:])]

        def apply(r: Tensor) -> Tensor:
            return self._join(self.batches.solve(self._split(r), shifts))

        return apply

    def _split(self, r: Tensor) -> list[Tensor]:
        """[W | b] of each group: a row of the vector has W, then b."""
        found = []
        for part, (blocks, m, n) in zip(r.split([b * m * n for b, m, n in self.shapes]), self.shapes):
            rows, V = part.view(blocks, m * n), part.new_empty(blocks, m, n)
            V[:, :, :-1] = rows[:, : m * (n - 1)].unflatten(1, (m, n - 1))
            V[:, :, -1] = rows[:, m * (n - 1) :]
            found.append(V)
        return found

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([torch.cat([V[:, :, :-1].flatten(1), V[:, :, -1]], 1).reshape(-1) for V in parts])

    def memory(self) -> dict[str, Any]:
        return {f"{name}{k}": part for k, pair in enumerate(self.batches.pairs) for name, part in zip("AG", pair)}

    @classmethod
    def recalled(cls, network: Any, memory: dict[str, Any]) -> DenseFactors:
        """The factors whose `memory` this was; `InputError` for a memory of others."""
        count = len(memory) // 2
        try:
            return cls(network, [FactorPair(memory[f"A{k}"], memory[f"G{k}"]) for k in range(count)])
        except KeyError as error:
            raise InputError("memory of Kronecker factors", ", ".join(sorted(memory)), "A0, G0, A1, ...") from error
