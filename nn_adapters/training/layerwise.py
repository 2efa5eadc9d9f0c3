"""Optimizers whose steps are as long as the weights of a layer allow, for large batches: LARS and LAMB.

The largest rate at which SGD stays stable differs from layer to layer with |W| / |G|, the norms of a weight matrix and
of its gradient; large rates, which large batches need, meet the layer with the smallest first. Here each matrix has a
rate of its own that is proportional to it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.layers.parallelmodule import parameter_groups, stacked_parameters
from pdeopt.core.errors import InputError, SolveFailure


def layerwise_groups(network: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups of parameters for `LARS` and `LAMB`: matrices, those of a `LayerParallel`, and biases and norms.

    Biases, and scales and shifts of normalizations, neither decay nor have rates of their own: what is small or starts
    from zero says nothing about the length of a step. In the stacks of a `LayerParallel` each layer has its rate, which
    takes no message, whatever the ranks. Frozen parameters are left out.

    Args:
        network: any module.
        weight_decay: of matrices, at least 0.

    Raises:
        InputError: a decay below 0.

    Example:
        >>> optimizer = LARS(layerwise_groups(network, weight_decay=5e-4), lr=10.0)
    """
    matrices, others = parameter_groups(network, weight_decay)
    stacked = stacked_parameters(network)
    split = {flag: [p for p in matrices["params"] if (id(p) in stacked) == flag] for flag in (False, True)}
    groups = [{**matrices, "params": params, "is_stacked": flag} for flag, params in split.items()]
    return [group for group in (*groups, {**others, "is_adapted": False}) if group["params"]]


class LayerwiseOptimizer(torch.optim.Optimizer):
    """An optimizer of PyTorch that compares a step of a layer with its weights.

    Without `layerwise_groups` every parameter of two axes or more is the matrix of a layer. Two entries of a group say
    otherwise: `is_adapted`, whether its parameters have rates of their own, and `is_stacked`, whether their leading
    axis is that of the layers. Gradients are read, never changed; parameters without one stay, with their state.

    A subclass writes `move`.

    Args:
        params: parameters, or groups of them.
        defaults: of a group.

    Raises:
        InputError: a value that is not legal.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, {"is_adapted": None, "is_stacked": False, **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As that of PyTorch's optimizers; checks the values."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "weight_decay", "trust", "eps"):
            if name in group and not group[name] >= 0.0:
                raise InputError(f"{type(self).__name__}: {name}", group[name], "a number >= 0")
        for factor in (group.get("momentum", 0.0), *group.get("betas", ())):
            if not 0.0 <= factor < 1.0:
                raise InputError(f"{type(self).__name__}: momentum or betas", factor, "0 <= factor < 1")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Change the parameters.

        Args:
            closure: evaluates the loss, with gradients, as those of PyTorch's optimizers; may be None.

        Returns:
            what the closure returned.

        Raises:
            InputError: sparse gradients, whose layers have no norm that says anything.
            SolveFailure: a gradient that is not finite; nothing has changed.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._check([p.grad for p, _ in pairs])
        for p, group in pairs:
            self.move(p, p.grad, group, self.state[p])
        return value

    @abstractmethod
    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Change a parameter by its gradient g, and its state."""

    def is_adapted(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether a parameter has a rate of its own."""
        chosen = group["is_adapted"]
        return p.dim() - group["is_stacked"] >= 2 if chosen is None else bool(chosen)

    def _check(self, gradients: list[Tensor]) -> None:
        if any(g.layout != torch.strided for g in gradients):
            raise InputError(f"{type(self).__name__}.step", "sparse gradients", "dense ones, or torch.optim.SparseAdam")
        if not all(bool(g.isfinite().all()) for g in gradients):
            raise SolveFailure("a gradient is not finite", "a smaller lr, a longer warm-up, or other samples")


class LARS(LayerwiseOptimizer):
    """Layer-wise adaptive rate scaling: SGD with momentum, at a rate of its own for each matrix w with gradient g.

        v <- m v + lr r (g + b w),   w <- w - v,   r = trust |w| / (|g| + b |w|)

    (Y. You, I. Gitman, B. Ginsburg, Large batch training of convolutional networks, arXiv 1708.03888, 2017, algorithm
    1): without momentum a step changes w by lr trust |w|. A matrix that is zero, or whose gradient is, has r = trust,
    and so have parameters that are not adapted: they go plain steps at the rate lr trust. The rate stands inside of the
    momentum, so that a warm-up does not enlarge what was gathered at smaller rates.

    Args:
        params: parameters, or groups of them, see `layerwise_groups`.
        lr: the rate, which schedules change.
        momentum: m, below 1.
        weight_decay: b, of all parameters; `layerwise_groups` leaves biases and norms out.
        trust: factor of all rates.

    Raises:
        InputError: a value that is not legal.

    Example:
        >>> optimizer = LARS(layerwise_groups(network, weight_decay=5e-4), lr=30.0)
        >>> course = torch.optim.lr_scheduler.LambdaLR(optimizer, Course(steps=200, warmup=40))
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 10.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        rate: Any = group["lr"] * group["trust"]
        if self.is_adapted(p, group):
            w_norm, g_norm = _norm(p, group), _norm(g, group)
            rate = rate * _quotient(w_norm, g_norm + group["weight_decay"] * w_norm)
        step = (g + group["weight_decay"] * p).mul_(rate)
        if group["momentum"]:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            step = state["momentum_buffer"].mul_(group["momentum"]).add_(step)
        p.sub_(step)


class LAMB(LayerwiseOptimizer):
    """Layer-wise adaptive moments: a step of Adam with decay, scaled to the norm of each matrix w.

        r = m^ / (sqrt(v^) + eps) + b w,   w <- w - lr min(|w|, most) / |r| r

    with Adam's means m^, v^ of gradients and squares, corrected for their start (Y. You, J. Li, S. Reddi et al., Large
    batch optimization for deep learning, ICLR 2020, algorithm 2, with phi(z) = min(z, most)). A matrix that is zero, or
    whose r is, and parameters that are not adapted, go w <- w - lr r.

    Args:
        params: parameters, or groups of them, see `layerwise_groups`.
        lr: the rate, which schedules change: |dw| / |w| of a step.
        betas: factors of the old means, below 1.
        eps: beside the root.
        weight_decay: b, of all parameters; `layerwise_groups` leaves biases and norms out.
        most: norm beyond which a layer's step grows no longer.

    Raises:
        InputError: a value that is not legal.

    Example:
        >>> optimizer = LAMB(layerwise_groups(network, weight_decay=0.01), lr=0.02)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        most: float = 10.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "most": most})

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        t = state["step"] = int(state["step"]) + 1
        (a, b), m, v = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        m.mul_(a).add_(g, alpha=1.0 - a)
        v.mul_(b).addcmul_(g, g, value=1.0 - b)
        root = (v / (1.0 - b**t)).sqrt_().add_(group["eps"])
        r = (m / (1.0 - a**t)).div_(root).add_(p, alpha=group["weight_decay"])
        rate: Any = group["lr"]
        if self.is_adapted(p, group):
            rate = rate * _quotient(_norm(p, group).clamp(max=group["most"]), _norm(r, group))
        p.sub_(r.mul_(rate))


def _norm(x: Tensor, group: dict[str, Any]) -> Tensor:
    """|x|, of each layer of a stack; in single precision at least, as squares of smaller formats overflow."""
    axes = tuple(range(1, x.dim())) if group["is_stacked"] else None
    precision = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=axes, keepdim=group["is_stacked"], dtype=precision)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 1 where one of them is zero."""
    return torch.where((a > 0.0) & (b > 0.0), a / b, 1.0)
