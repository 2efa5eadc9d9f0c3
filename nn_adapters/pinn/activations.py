"""Activations with as many derivatives as jets take: tanh and sin by formulas, all others by torch, checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from pdeopt.core.errors import InputError

#: Derivatives of an activation: one more than of a network by its inputs, for the gradient.
MOST = 5

#: (z, a, s1, s2, ...): writes act(z), and as many of its derivatives as there are further arrays, `MOST` at most.
Activation = Callable[..., None]

#: z -> act(z), entry by entry.
Pointwise = Callable[[Tensor], Tensor]

#: Where an activation is looked at, and the part of its range by which a derivative may differ from the integral of the
#: next one between neighbors: at a kink one of them differs by all of a jump.
PLACES, JUMP = torch.linspace(-6.0, 6.0, 9973, dtype=torch.float64), 0.05


def _tanh(z: Tensor, a: Tensor, *s: Tensor) -> None:
    """a; s1 = 1 - a^2; -2 a s1; (6 a^2 - 2) s1 = (4 - 6 s1) s1; (4 - 12 s1) s2; (4 - 12 s1) s3 - 12 s2^2."""
    if z.is_cpu:
        np.tanh(z.numpy(), out=a.numpy())  # three times as fast as torch's
    else:
        torch.tanh(z, out=a)
    rules: list[Callable[[Tensor], object]] = [
        lambda out: torch.mul(a, a, out=out).neg_().add_(1.0),
        lambda out: torch.mul(a, s[0], out=out).mul_(-2.0),
        lambda out: torch.mul(s[0], -6.0, out=out).add_(4.0).mul_(s[0]),
        lambda out: torch.mul(s[0], -12.0, out=out).add_(4.0).mul_(s[1]),
        lambda out: torch.mul(s[0], -12.0, out=out).add_(4.0).mul_(s[2]).addcmul_(s[1], s[1], value=-12.0),
    ]
    for rule, out in zip(rules, s):
        rule(out)


def _sin(z: Tensor, a: Tensor, *s: Tensor) -> None:
    torch.sin(z, out=a)
    torch.cos(z, out=s[0])
    for out, before in zip(s[1:], (a, *s)):
        torch.neg(before, out=out)


def _plain_tanh(z: Tensor, order: int) -> list[Tensor]:
    a = torch.tanh(z)
    s1 = 1.0 - a * a
    s2 = -2.0 * a * s1
    found = [a, s1, s2]
    if order > 2:
        found += [(4.0 - 6.0 * s1) * s1, (4.0 - 12.0 * s1) * s2]
    return found


def _plain_sin(z: Tensor, order: int) -> list[Tensor]:
    a, s1 = torch.sin(z), torch.cos(z)
    return [a, s1, -a, -s1, a]


#: By formulas.
JET_ACTIVATIONS: dict[str, Activation] = {"tanh": _tanh, "sin": _sin}

#: The same for `torch.func`: z, order -> act(z), act'(z), ... at least up to the order.
TORCH_ACTIVATIONS: dict[str, Callable[[Tensor, int], list[Tensor]]] = {"tanh": _plain_tanh, "sin": _plain_sin}

#: Others, whose derivatives are torch's.
POINTWISE: dict[str, Pointwise] = {
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: 0.5 * z * (1.0 + torch.erf(z / math.sqrt(2.0))),
    "softplus": lambda z: torch.logaddexp(z, torch.zeros_like(z)),
    "sigmoid": torch.sigmoid,
}

#: All that have a name.
ACTIVATION_NAMES = (*JET_ACTIVATIONS, *POINTWISE)


def writing(activation: str | Pointwise) -> Activation:
    """The activation of a name, or any function of torch operations, as one that writes its derivatives, too."""
    if isinstance(activation, str) and activation in JET_ACTIVATIONS:
        return JET_ACTIVATIONS[activation]
    function = _function(activation)

    def write(z: Tensor, a: Tensor, *s: Tensor) -> None:
        for out, value in zip((a, *s), _derivatives(function, len(s))(z)):
            out.copy_(value)

    return write


def derivatives(activation: str | Pointwise, z: Tensor, order: int) -> list[Tensor]:
    """act(z), act'(z), ... at least up to the order, by operations that `torch.func` differentiates."""
    if isinstance(activation, str) and activation in TORCH_ACTIVATIONS:
        return TORCH_ACTIVATIONS[activation](z, order)
    return list(_derivatives(_function(activation), order)(z))


def check_activation(activation: object) -> None:
    """Refuse what is no activation of a network that is differentiated.

    One with a kink, as ReLU, would have derivatives that are not the limits of its differences: an equation of second
    order would seem to hold where it does not.

    Raises:
        InputError: an unknown name; a function that torch cannot differentiate `MOST` times, that does not work entry
            by entry, or one of whose first `MOST` - 1 derivatives jumps between -6 and 6.
    """
    if isinstance(activation, str) and activation in ACTIVATION_NAMES:
        return
    if isinstance(activation, str) or not callable(activation):
        legal = f"{' | '.join(ACTIVATION_NAMES)} | a smooth function of torch operations, entry by entry"
        raise InputError("activation", repr(activation), legal)
    if why := _defect(activation):
        raise InputError("activation", why, f"a function of torch operations, entry by entry, {MOST} times smooth")


@cache
def _defect(function: Pointwise) -> str:
    """What is wrong with a function, empty for nothing."""
    z = PLACES
    try:
        values, pair = _derivatives(function, MOST)(z), function(z[:10].view(2, 5).T)
    except RuntimeError as error:  # of torch, for an operation without a derivative
        return f"one that torch does not differentiate: {error}"
    if any(value.shape != z.shape or not bool(value.isfinite().all()) for value in values):
        return "one whose values or derivatives are not finite, or not one an entry"
    if pair.shape != (5, 2) or not torch.allclose(pair, values[0][:10].view(2, 5).T, rtol=1e-12, atol=1e-12):
        return "one that does not work entry by entry"
    for order, (value, slope) in enumerate(pairwise(values)):
        miss = value.diff() - 0.5 * (slope[1:] + slope[:-1]) * z.diff()
        if float(miss.abs().max()) > JUMP * float(value.max() - value.min()):
            return f"one whose derivative of order {order} jumps, near {float(z[int(miss.abs().argmax())]):.2g}"
    return ""


def _function(activation: str | Pointwise) -> Pointwise:
    return POINTWISE[activation] if isinstance(activation, str) else activation


def _derivatives(function: Pointwise, order: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """z -> value, first derivative, ..., up to an order, by nested forward differentiation."""
    if order == 0:
        return lambda z: (function(z),)
    lower = _derivatives(function, order - 1)

    def found(z: Tensor) -> tuple[Tensor, ...]:
        values, slopes = jvp(lower, (z,), (torch.ones_like(z),))
        return (*values, slopes[-1])

    return found
