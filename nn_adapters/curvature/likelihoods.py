"""Losses as negative log-likelihoods: values, and the Fisher matrix H of a sample's outputs, in four forms.

The Fisher matrix of a network is mean J'HJ over samples, J the derivative of the outputs by the parameters. For the
losses here, whose outputs are natural parameters, it is the generalized Gauss-Newton matrix, too (J. Martens, New
insights and perspectives on the natural gradient method, JMLR 21, 2020, section 9.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from pdeopt.core.errors import InputError

REDUCTIONS = ("mean", "sum")


class Likelihood(ABC):
    """The loss of a batch, mean or sum over its samples of a convex function of a sample's outputs.

    Outputs are (samples, ...); all but the first axis belong to one sample. H is that of one sample, whatever the
    reduction.

    Args:
        reduction: "mean" | "sum" over the samples.

    Raises:
        InputError: another reduction.
    """

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in REDUCTIONS:
            raise InputError("reduction of a loss", reduction, " | ".join(REDUCTIONS))
        self.reduction = reduction
        # targets of the calls with gradients, for the empirical Fisher matrix; None where no optimizer asks for them
        self.seen: list[Tensor] | None = None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, a scalar: as those of `torch.nn.functional`."""
        if self.seen is not None and outputs.requires_grad:
            self.seen.append(targets)
        each = self.each(outputs, targets)
        return each.mean() if self.reduction == "mean" else each.sum()

    def weight(self, samples: int) -> float:
        """Of a sample in the loss: 1 / samples, or 1."""
        return 1.0 / samples if self.reduction == "mean" else 1.0

    @abstractmethod
    def each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each sample, (samples,)."""

    @abstractmethod
    def times(self, outputs: Tensor, v: Tensor) -> Tensor:
        """H v for each sample, shaped as the outputs."""

    @abstractmethod
    def columns(self, outputs: Tensor) -> list[Tensor]:
        """Tensors l_c shaped as the outputs with sum_c l_c l_c' = H for each sample."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """g shaped as the outputs, random, with E gg' = H: the gradient for targets that the network itself draws."""

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The derivative of each sample's loss by its outputs."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            return torch.autograd.grad(self.each(leaf, targets).sum(), leaf)[0]


class CrossEntropy(Likelihood):
    """Cross-entropy of scores (samples, classes) and classes (samples,): H = diag(p) - pp' with p the softmax.

    Args:
        reduction: as that of `nn.functional.cross_entropy`.
        smoothing: of the labels, its `label_smoothing`; H is the same.

    Example:
        >>> loss = CrossEntropy()
        >>> loss(network(x), labels).backward()
    """

    def __init__(self, reduction: str = "mean", smoothing: float = 0.0) -> None:
        super().__init__(reduction)
        if not 0.0 <= smoothing < 1.0:
            raise InputError("smoothing of labels", smoothing, "0 to 1")
        self.smoothing = smoothing

    def each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self._check(outputs)
        return nn.functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.smoothing)

    def times(self, outputs: Tensor, v: Tensor) -> Tensor:
        p = outputs.softmax(-1)
        return p * (v - (p * v).sum(-1, keepdim=True))

    def columns(self, outputs: Tensor) -> list[Tensor]:
        self._check(outputs)
        p = outputs.softmax(-1)
        root = p.sqrt()
        units = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        return [root * unit - p * root[:, c : c + 1] for c, unit in enumerate(units)]

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self._check(outputs)
        p = outputs.softmax(-1)
        drawn = torch.multinomial(p.detach().cpu(), 1, replacement=True, generator=generator).to(p.device)
        return p - torch.zeros_like(p).scatter_(1, drawn, 1.0)

    def _check(self, outputs: Tensor) -> None:
        if outputs.dim() != 2:
            raise InputError("outputs of cross-entropy", tuple(outputs.shape), "(samples, classes)")


class SquaredError(Likelihood):
    """|x - y|^2 / 2 summed over the outputs of a sample: H = I, the likelihood of a Gaussian of deviation 1.

    `nn.functional.mse_loss` is 2 / outputs of it.

    Args:
        reduction: over the samples.
        factor: of the loss and of H.
    """

    def __init__(self, reduction: str = "mean", factor: float = 1.0) -> None:
        super().__init__(reduction)
        if not factor > 0.0:
            raise InputError("factor of a squared error", factor, "> 0")
        self.factor = factor

    def each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:
            raise InputError("targets of a squared error", tuple(targets.shape), str(tuple(outputs.shape)))
        return 0.5 * self.factor * (outputs - targets).square().flatten(1).sum(1)

    def times(self, outputs: Tensor, v: Tensor) -> Tensor:
        return self.factor * v

    def columns(self, outputs: Tensor) -> list[Tensor]:
        units = torch.eye(outputs[0].numel(), dtype=outputs.dtype, device=outputs.device)
        root = self.factor**0.5
        return [(root * unit).reshape(1, *outputs.shape[1:]).expand_as(outputs) for unit in units]

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
        return self.factor**0.5 * noise.to(outputs.device)
