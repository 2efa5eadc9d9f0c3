"""Steps of gated recurrent units as functions of tensors: what the gates are, and how long a step keeps them.

    r = sigma(x_r + U_r h), z = sigma(x_z + U_z h), n = tanh(x_n + r (U_n h)),      h_t = n + q (h_{t-1} - n)

with q = z^dt (classic) or (1 + (1 - z))^-dt (implicit). In the place of an interval of steps stands one of two stages:
with the gates of h for half of the interval, then, from h again, with the gates of where that has led. This is the
midpoint rule, exact for any length where the gates are held, and of second order where the state moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdeopt.core.errors import InputError


def gates(at: Tensor, z: Sequence[Tensor], p: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The logit of 1 - z, and n, at states; p is U and c, or a function that applies both."""
    x_r, x_z, x_n = z[0].chunk(3, -1)
    h_r, h_z, h_n = (p[0](at) if len(p) == 1 else torch.nn.functional.linear(at, *p)).chunk(3, -1)
    return -x_z - h_z, torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)


def _column(dt: float | Tensor, like: Tensor) -> float | Tensor:
    return dt if isinstance(dt, float) else dt.to(like).reshape(-1, 1, 1)


def classic_step(
    h: Tensor, z: Sequence[Tensor], p: Sequence[Any], dt: float | Tensor, at: Tensor | None = None
) -> Tensor:
    """n + z^dt (h - n): dt = 1 is PyTorch's GRU; a longer step is dt of them, the gates held, and stable.

    Args:
        h: hidden states before the steps, (steps, batch, hidden).
        z: the gates of the inputs, W x + b, (steps, batch, 3 hidden), in a sequence of one.
        p: U, (3 hidden, hidden), and its bias, (3 hidden,).
        dt: length of the steps.
        at: the states that the gates see; those before the steps by default.
    """
    logit, n = gates(h if at is None else at, z, p)
    if isinstance(dt, float) and dt == 1.0:
        return h + torch.sigmoid(logit) * (n - h)
    keep = -torch.expm1(_column(dt, h) * torch.nn.functional.logsigmoid(-logit))  # 1 - z^dt
    return h + keep * (n - h)


def implicit_step(
    h: Tensor, z: Sequence[Tensor], p: Sequence[Any], dt: float | Tensor, at: Tensor | None = None
) -> Tensor:
    """n + (1 + k)^-dt (h - n), k = 1 - z: implicit in h, with gates at the old state; a longer step is dt of them.

    Moon, Cyr, 2022; arguments as for `classic_step`.
    """
    logit, n = gates(h if at is None else at, z, p)
    k = torch.sigmoid(logit)
    if isinstance(dt, float) and dt == 1.0:
        return (h + k * n) / (1.0 + k)
    return n + torch.exp(-_column(dt, h) * torch.log1p(k)) * (h - n)


#: Steps of a GRU by its kind.
GRU_STEPS = {"implicit": implicit_step, "classic": classic_step}


def long_step(
    step: Callable[..., Tensor], shortest: float, h: Tensor, z: Sequence[Tensor], p: Sequence[Any], dt: float | Tensor
) -> Tensor:
    """The states after steps of two stages, in the place of intervals of steps of length `shortest`.

    Args:
        step: one of `GRU_STEPS`.
        shortest: dt of a step of the interval; for intervals of one step, the step itself.
        h, z, p, dt: as of `step`.
    """
    return step(h, z, p, dt, at=step(h, z, p, (dt - shortest) / 2))


def kept(kind: str, z: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor]:
    """q of h_t = n + q (h - n) from the update gate, and its derivative by the logit of z."""
    k, is_short = 1.0 - z, isinstance(dt, float) and dt == 1.0
    dt = _column(dt, z)
    if kind == "classic":
        q = z if is_short else torch.pow(z, dt)
        return q, q * k * dt
    long = 1.0 + k
    q = long.reciprocal() if is_short else torch.pow(long, -dt)
    return q, (q * k * z).div_(long).mul_(dt)


#: The logit of an update gate z that is 1 to the last bit, whatever the hidden state adds to it.
HELD = 1e4


def require_mask(mask: Tensor, shape: Sequence[int]) -> None:
    """Raise `InputError` for a mask of another shape or type than `shape`, one a step of each sequence, and bool."""
    if mask.shape != torch.Size(shape) or mask.dtype != torch.bool:
        got = f"{mask.dtype}, {tuple(mask.shape)}"
        raise InputError("mask of sequences", got, f"torch.bool, one a step of each sequence, {tuple(shape)}")


def hold_where_padded(gates: Tensor, mask: Tensor | None) -> Tensor:
    """The gates of inputs with z = 1 in steps that are padding: there the state stays as it is, on coarse levels, too.

    So the last state of a padded sequence is that after its last true step, and padding has no part in gradients.

    Args:
        gates: W x + b, (steps, batch, 3 hidden).
        mask: false where a sequence is padded, (steps, batch); None for no padding.

    Raises:
        InputError: a mask of another shape or type.
    """
    if mask is None:
        return gates
    require_mask(mask, gates.shape[:2])
    r, z, n = gates.chunk(3, -1)
    return torch.cat([r, torch.where(mask[..., None], z, HELD), n], -1)


class Moved(NamedTuple):
    """Of h_t = n + q (h - n): q; derivatives of h_t by the logit of z, and by the sum in n; of that by r's logit; r."""

    q: Tensor
    by_z: Tensor
    by_n: Tensor
    by_r: Tensor
    r: Tensor

    def of_gates(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The cotangents of U h + c, and of the sum in n, from that of h_t."""
        s = w * self.by_n
        return torch.cat([s * self.by_r, w * self.by_z, s * self.r], -1), s

    def rows(self, rows: slice) -> Moved:
        """Of some of the steps."""
        return Moved(*(part[rows] for part in self))


def move(
    kind: str, h: Tensor, at: Tensor, x: Tensor, shared: Sequence[Tensor], dt: float | Tensor
) -> tuple[Moved, Tensor]:
    """h_t with the gates of the states `at`, and its derivatives by these gates."""
    size, a = h.shape[-1], torch.nn.functional.linear(at, *shared)
    r, z = torch.sigmoid(x[..., : 2 * size] + a[..., : 2 * size]).split(size, -1)
    a_n = a[..., 2 * size :]
    n = torch.addcmul(x[..., 2 * size :], r, a_n).tanh_()
    q, slope = kept(kind, z, dt)
    ahead, less = h - n, q - 1.0
    by_n = n.square().sub_(1.0).mul_(less)
    by_r = (r * a_n).mul_(1.0 - r)
    value = torch.addcmul(h, less, ahead)  # h to the last bit where q is 1
    return Moved(q, slope.mul_(ahead), by_n, by_r, r), value


def through_gates(w: Tensor, of_hidden: Tensor, U: Tensor) -> Tensor:
    """w + U' of_hidden: the cotangent of the states that gates see is added to one of states, (rows, batch, hidden)."""
    return torch.addmm(w.flatten(0, 1), of_hidden.flatten(0, 1), U).view_as(w)
