"""The split variables of all samples of a rank, worked on in chunks: memory is that of the states, and of one chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nn_adapters.splitting.proximal import Loss
from nn_adapters.splitting.splitlayers import SplitLayer
from nn_adapters.splitting.splitstates import SplitStates
from pdeopt.optimize.splitting import SplitWork

#: Numbers of a state, or of its patches, in a chunk of samples.
NUMBERS = 2**17

#: Numbers that the work on one number of a chunk has at once, at the most.
AT_ONCE = 8

#: Samples whose random states are drawn at once; a multiple of 16, by which the numbers do not depend on it.
DRAWN = 1024


class WholeStates(SplitStates):
    """States of which one chunk after the other is worked on; nothing but a, z and lambda is kept whole.

    Args:
        layers, W, loss, penalties, work, x, y: as for `SplitStates`.

    Attributes:
        chunk: samples of a chunk.
    """

    def __init__(
        self,
        layers: Sequence[SplitLayer],
        W: list[Tensor],
        loss: Loss,
        penalties: tuple[Sequence[float], Sequence[float]],
        work: SplitWork,
        x: Tensor,
        y: Tensor,
    ) -> None:
        super().__init__(layers, W, loss, penalties, work, x[:0], y[:0])
        shapes = [[each.shape[1:] for each in kept] for kept in (self.a, self.z)]
        patches = [shape.numel() // layer.outputs * layer.inputs for shape, layer in zip(shapes[1][1:], layers)]
        self.chunk = max(1, NUMBERS // max(*patches, *(shape.numel() for kept in shapes for shape in kept)))
        self.a = [x] + [x.new_empty(len(x), *shape) for shape in shapes[0][1:]]
        self.z = self.z[:1] + [x.new_empty(len(x), *shape) for shape in shapes[1][1:]]
        self.y, self.multiplier, self.start = y, torch.zeros_like(self.z[-1]), ([], [])
        self.forget()

    def parts(self) -> Iterator[SplitStates]:
        """One chunk of samples after the other."""
        for begin in range(0, len(self.y), self.chunk):
            yield self.part(slice(begin, begin + self.chunk))

    @property
    def footprint(self) -> int:
        """Bytes of what the work on a chunk takes: the proximal maps have the most at once."""
        return AT_ONCE * NUMBERS * self.a[0].element_size()

    def go_forward(self) -> None:
        """The states of a forward pass."""
        for part in self.parts():
            fresh = SplitStates(self.layers, self.W, self.loss, (self.beta, self.gamma), self.work, part.a[0], part.y)
            for old, new in zip(part.a[1:] + part.z[1:], fresh.a[1:] + fresh.z[1:]):
                old.copy_(new)

    def draw(self, seed: int, samples: int, first: int) -> None:
        """Normal states; those of a sample are the same on any number of ranks.

        Args:
            seed: of the generator.
            samples: those of all ranks.
            first: the number of the first one here.
        """
        generator = torch.Generator().manual_seed(seed)
        for state in self.a[1:] + self.z[1:]:
            for start in range(0, samples, DRAWN):
                stop = min(start + DRAWN, samples)
                drawn = torch.randn(stop - start, *state.shape[1:], generator=generator, dtype=state.dtype)
                low, high = max(start, first), min(stop, first + len(state))
                if low < high:
                    state[low - first : high - first] = drawn[low - start : high - start]

    def memory(self) -> dict[str, Any]:
        """What a restart needs."""
        kept = {f"a{k}": a.clone() for k, a in enumerate(self.a) if k}  # a_0 is the data
        return kept | {f"z{k}": z.clone() for k, z in enumerate(self.z) if k} | {"multiplier": self.multiplier.clone()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""
        for name, kept in (("a", self.a), ("z", self.z)):
            for k in range(1, len(kept)):
                kept[k].copy_(memory[f"{name}{k}"])
        self.multiplier.copy_(memory["multiplier"])
