"""A deep pre-LN transformer whose blocks are solved in parallel: characters of Python's own documentation, or digits.

python -m problems.transformer -epochs 2                      # the next character, causal
python -m problems.transformer -data digits -dropout 0.1      # images of digits, rows are tokens
mpiexec -n 2 python -m problems.transformer -layers 64
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.data import digits
from nn_adapters.layers import EncoderBlock
from problems.shared.command_line import start
from problems.shared.files import DataFiles
from problems.shared.layer_training import LayerTraining

#: The characters of the text; all others are spaces.
CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"


@dataclass(frozen=True)
class TransformerSettings(po.Settings):
    """The network and its data."""

    data: str = po.setting("text", "the next character of a text, or images of digits", choices=("text", "digits"))
    layers: int = po.setting(32, "blocks", at_least=1)
    width: int = po.setting(32, "features of a token", at_least=1)
    heads: int = po.setting(4, "heads of the attention, which share the width", at_least=1)
    hidden: int = po.setting(64, "neurons of the dense network of a block", at_least=1)
    dropout: float = po.setting(0.0, "share of entries that are dropped in training", at_least=0, at_most=1)
    causal: bool = po.setting(None, "tokens see those before them alone; default: for text", kind=bool)
    tokens: int = po.setting(32, "characters of a sample of text", at_least=2)
    windows: int = po.setting(2000, "samples of text", at_least=10)
    first_scale: float = po.setting(0.1, "factor of the blocks' first weights", above=0)

    @property
    def is_causal(self) -> bool:
        """Whether a token sees those before it alone."""
        return self.data == "text" if self.causal is None else self.causal


class Classifier(nn.Module):
    """Tokens with positions, blocks u + F(u), a norm and a closing layer: for each token, or for their mean.

    Samples are whole numbers (batch, tokens), of characters, or (batch, tokens, features).
    """

    def __init__(self, settings: TransformerSettings, comm: Any, mgrit: nna.MgritSettings, data: nna.Dataset) -> None:
        super().__init__()
        own, tokens = settings, data.x_train.shape[1]
        self.each = data.y_train.dim() == 2
        self.entry = nn.Embedding(data.classes, own.width) if self.each else nn.Linear(data.x_train.shape[2], own.width)
        self.positions = nn.Parameter(0.1 * torch.randn(tokens, own.width))

        def block() -> nn.Module:
            return EncoderBlock(own.width, own.heads, own.hidden, own.dropout, own.is_causal)

        self.layers = nna.LayerParallel(comm, block, own.layers, float(own.layers), mgrit)
        with torch.no_grad():  # matrices alone: norms stay what they are
            for stack in self.layers.stacks:
                if stack.dim() > 2:
                    stack.mul_(own.first_scale)
        self.norm, self.closing = nn.LayerNorm(own.width), nn.Linear(own.width, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(self.layers(self.entry(x.long() if self.each else x) + self.positions))
        scores: Tensor = self.closing(u if self.each else u.mean(1))
        return scores.mT if self.each else scores


def documentation() -> str:
    """The text of Python's language reference, as its standard library has it for `help()`."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def text(tokens: int, windows: int, seed: int) -> nna.Dataset:
    """Windows of the documentation, (n, tokens) numbers of characters, and the characters that follow each.

    The last tenth of the text is for tests: no window of it overlaps one for training.
    """
    table = {c: k for k, c in enumerate(CHARACTERS)}
    codes = np.array([table.get(c, 0) for c in documentation()], dtype=np.int64)
    rng, cut = np.random.default_rng(seed), len(codes) * 9 // 10
    parts = []
    for low, high, count in ((0, cut, windows), (cut, len(codes), max(windows // 10, 1))):
        begin = rng.integers(low, high - tokens - 1, count)
        rows = torch.from_numpy(codes[begin[:, None] + np.arange(tokens + 1)])
        parts += [rows[:, :-1], rows[:, 1:]]
    return nna.Dataset("text", *parts, len(CHARACTERS))


def samples(own: TransformerSettings, files: DataFiles, seed: int) -> nna.Dataset:
    """The data that the settings name."""
    if files.data_dir or files.fetch:
        raise po.InputError(
            "-data_dir, -fetch", "no files to read", "text and digits come with Python and scikit-learn"
        )
    if own.width % own.heads:
        raise po.InputError("-heads", f"{own.heads} for a width of {own.width}", "a divisor of the width")
    if own.data == "text":
        return text(own.tokens, own.windows, seed)
    found = digits(seed)
    rows = {name: getattr(found, name)[:, 0] for name in ("x_train", "x_test")}
    return nna.Dataset("digits", rows["x_train"], found.y_train, rows["x_test"], found.y_test, found.classes)


def _numbers(own: TransformerSettings, batch: int) -> float:
    block = own.width * (4 * own.width + 2 * own.hidden)
    return own.layers * (block + batch * own.tokens * (own.width + own.hidden)) + 2.0 * own.windows * own.tokens


SCRIPT = LayerTraining(
    "transformer",
    __doc__,
    TransformerSettings,
    data=samples,
    control=None,
    make=Classifier,
    second_order=(),
    numbers=_numbers,
    defaults={
        nna.TrainingSettings: {"epochs": 4, "batch": 50, "lr": 3e-3},
        nna.MgritSettings: {"long_steps": "fitted"},
    },
)
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the test accuracy of the weights run serially."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
