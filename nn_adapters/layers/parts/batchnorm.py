"""Batch normalization of many layers at once, and the running averages of what the last states had.

In training a layer's mean and variance are those of the batch (S. Ioffe, C. Szegedy, Batch normalization, ICML 2015):
functions of features, which may be evaluated as often as it takes. What is left behind, running averages, is not: here
an evaluation only notes what it saw, layer by layer, and the averages move once a call, by the states that count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Modules that become a `NotingNorm`.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class NotingNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization that leaves its running averages alone, and keeps what it saw in `seen`.

    Args:
        norm: whose parameters and buffers it takes.
        place: its name in the block; none where it is the block.

    Attributes:
        prefix: of the names of its buffers.
        seen: mean and variance, (channels,) each, of the last call in training; those that move the averages.
    """

    def __init__(self, norm: Any, place: str) -> None:
        super().__init__(0, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        self._parameters, self._buffers, self.training = norm._parameters, norm._buffers, norm.training
        self.prefix = f"{place}." if place else ""
        self.seen: tuple[Tensor, Tensor] | None = None

    @property
    def averages(self) -> tuple[str, str]:
        """The names of mean and variance among the buffers of the block."""
        return f"{self.prefix}running_mean", f"{self.prefix}running_var"

    def forward(self, u: Tensor) -> Tensor:
        """u normalized, by its own statistics in training and by the running ones else."""
        if not (self.training or self.running_mean is None):
            return F.batch_norm(u, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if self.running_mean is not None:
            axes = [axis for axis in range(u.dim()) if axis != 1]
            var, mean = torch.var_mean(u.detach().to(self.running_mean.dtype), axes)
            self.seen = mean, var
        return F.batch_norm(u, None, None, self.weight, self.bias, True, 0.0, self.eps)


def note_batch_norms(block: nn.Module) -> tuple[nn.Module, list[NotingNorm]]:
    """Replace the batch norms inside a block by `NotingNorm`, in place.

    Args:
        block: any module.

    Returns:
        the block, or what takes its place, and those that keep averages.
    """
    if is_batch_norm(block):
        block = NotingNorm(block, "")
    for path, part in list(block.named_modules()):
        for name, child in list(part._modules.items()):
            if child is not None and is_batch_norm(child):
                part._modules[name] = NotingNorm(child, f"{path}.{name}" if path else name)
    return block, [part for part in block.modules() if isinstance(part, NotingNorm) and part.running_mean is not None]


def is_batch_norm(part: nn.Module) -> bool:
    """Whether a module is a batch norm that `note_batch_norms` knows."""
    return type(part) in BATCH_NORMS and not (part._forward_hooks or part._forward_pre_hooks)


def batch_norm(module: NotingNorm) -> Callable[..., Tensor]:
    """A `NotingNorm` of features (layers, batch, channels, ...) with parameters (layers, channels)."""
    keeps = module.running_mean is not None

    def call(u: Tensor, theta: Sequence[Tensor], given: Any) -> Tensor:
        layers = len(u)
        together = u.transpose(0, 1).flatten(1, 2)  # (batch, layers * channels, ...)
        weight, bias = (t.flatten() for t in theta) if theta else (None, None)
        mean, var = (given.buffers[name].flatten() for name in module.averages) if keeps else (None, None)
        is_training = given.is_training(module)
        by_batch = is_training or not keeps
        out = F.batch_norm(together, mean, var, weight, bias, by_batch, 1.0, module.eps)  # 1: averages of one batch
        if is_training and keeps:
            given.note(module, mean.reshape(layers, -1), var.reshape(layers, -1))
        return torch.unflatten(out, 1, (layers, -1)).transpose(0, 1)

    return call


@dataclass
class Statistics:
    """What the batch norms of layers saw, each layer when it was last evaluated.

    Args:
        norms: of the block, those that keep averages.
        buffers: of all layers of this rank, (n_local, ...) each, by name.
    """

    norms: Sequence[NotingNorm]
    buffers: Mapping[str, Tensor]
    seen: dict[str, Tensor] = field(default_factory=dict)

    def note(self, rows: Tensor, norm: NotingNorm, mean: Tensor, var: Tensor) -> None:
        """Mean and variance, (rows, channels) each, of these layers."""
        for name, values in zip(norm.averages, (mean, var)):
            if name not in self.seen:
                self.seen[name] = torch.zeros_like(self.buffers[name])
            self.seen[name][rows] = values.detach().to(self.seen[name])

    def move_averages(self) -> None:
        """One step of the running averages, as `nn.BatchNorm1d` takes it, of the layers of this rank."""
        for norm in self.norms:
            if norm.averages[0] not in self.seen:  # no layer here has called it
                continue
            count = self.buffers[f"{norm.prefix}num_batches_tracked"]
            count += 1
            for name in norm.averages:
                share: Any = norm.momentum
                if share is None:  # the mean of all batches
                    share = (1.0 / count.double()).to(self.buffers[name])[:, None]
                self.buffers[name].mul_(1 - share).add_(share * self.seen[name])
