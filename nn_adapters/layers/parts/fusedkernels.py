"""Compiled loops through many dense layers u + dt act(W u + b): all layers in one pass over tiles of samples.

In a narrow network a call costs more than its arithmetic. Here a tile of samples stays in a core's nearest cache while
it goes through all layers, samples in vector lanes; what it leaves behind are the activations, which the adjoint reads
backward. States in between are not kept: u_{i-1} = u_i - dt act_i undoes a step with one more rounding.

Numba compiles the loops for the processor at hand, once for each activation and precision, and keeps them in its cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

#: Samples of a tile: the lanes of the inner loops, whose length the compiler must know.
TILE = 64

#: Neurons that a loop over lanes takes at a time; widths are multiples of it.
BLOCK = 8

#: Activations that the loops know.
KINDS = ("relu", "tanh", "silu")

#: Options of the compiler: sums may be reordered, so that they fit vector lanes; numbers that are not finite stay so.
FAST = {"reassoc", "contract", "nsz", "arcp"}


@lru_cache
def compiled(kind: str, precision: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """The loops forward and backward, see `_forward` and `_backward`.

    Args:
        kind: of `KINDS`.
        precision: "float32" or "float64".

    Raises:
        ImportError: no Numba.
    """
    from numba import njit

    compile_ = njit(fastmath=FAST, nogil=True, cache=True, error_model="numpy", boundscheck=False)
    number = getattr(np, precision)
    activate, derive = (compile_(function) for function in ACTIVATIONS[kind](number, compile_))
    products = _products(compile_(_along_row), compile_(_along_column))
    load, multiply, multiply_transposed, outer = map(compile_, (_load, *products))
    forward = _forward(load, multiply, activate)
    return compile_(forward), compile_(_backward(number(0), load, multiply_transposed, outer, derive))


# -- products over a tile ----------------------------------------------------------------------------------


def _along_row(A: Any, i: Any, j: Any) -> Any:
    """Eight entries of a row."""
    return A[i, j], A[i, j + 1], A[i, j + 2], A[i, j + 3], A[i, j + 4], A[i, j + 5], A[i, j + 6], A[i, j + 7]


def _along_column(A: Any, i: Any, j: Any) -> Any:
    """Eight entries of a column."""
    return A[i, j], A[i + 1, j], A[i + 2, j], A[i + 3, j], A[i + 4, j], A[i + 5, j], A[i + 6, j], A[i + 7, j]


def _products(row: Any, column: Any) -> tuple[Any, Any, Any]:
    """The products of a tile with W and W', and of two tiles; two rows at a time, which share what is loaded."""

    def multiply(W: Any, b: Any, u: Any, a: Any) -> None:
        """a = W u + b, with u, a (width, TILE)."""
        width = W.shape[0]
        for i in range(0, width, 2):
            for t in range(TILE):
                a[i, t], a[i + 1, t] = b[i], b[i + 1]
            for j in range(0, width, BLOCK):
                v0, v1, v2, v3, v4, v5, v6, v7 = row(W, i, j)
                w0, w1, w2, w3, w4, w5, w6, w7 = row(W, i + 1, j)
                for t in range(TILE):
                    u0, u1, u2, u3, u4, u5, u6, u7 = column(u, j, t)
                    v = ((v0 * u0 + v1 * u1) + (v2 * u2 + v3 * u3)) + ((v4 * u4 + v5 * u5) + (v6 * u6 + v7 * u7))
                    w = ((w0 * u0 + w1 * u1) + (w2 * u2 + w3 * u3)) + ((w4 * u4 + w5 * u5) + (w6 * u6 + w7 * u7))
                    a[i, t] += v
                    a[i + 1, t] += w

    def multiply_transposed(W: Any, s: Any, w: Any) -> None:
        """w += W's."""
        width = W.shape[0]
        for j in range(0, width, 2):
            for i in range(0, width, BLOCK):
                v0, v1, v2, v3, v4, v5, v6, v7 = column(W, i, j)
                w0, w1, w2, w3, w4, w5, w6, w7 = column(W, i, j + 1)
                for t in range(TILE):
                    s0, s1, s2, s3, s4, s5, s6, s7 = column(s, i, t)
                    v = ((v0 * s0 + v1 * s1) + (v2 * s2 + v3 * s3)) + ((v4 * s4 + v5 * s5) + (v6 * s6 + v7 * s7))
                    y = ((w0 * s0 + w1 * s1) + (w2 * s2 + w3 * s3)) + ((w4 * s4 + w5 * s5) + (w6 * s6 + w7 * s7))
                    w[j, t] += v
                    w[j + 1, t] += y

    def outer(s: Any, u: Any, dt: Any, zero: Any, G: Any, g: Any) -> None:
        """s becomes dt s; then G += s u', g += s 1."""
        width = G.shape[0]
        for i in range(width):
            total = zero
            for t in range(TILE):
                s[i, t] *= dt
                total += s[i, t]
            g[i] += total
        for i in range(0, width, 2):
            for j in range(0, width, BLOCK):
                v0, v1, v2, v3, v4, v5, v6, v7 = zero, zero, zero, zero, zero, zero, zero, zero
                w0, w1, w2, w3, w4, w5, w6, w7 = zero, zero, zero, zero, zero, zero, zero, zero
                for t in range(TILE):
                    x, y = s[i, t], s[i + 1, t]
                    u0, u1, u2, u3, u4, u5, u6, u7 = column(u, j, t)
                    v0, v1, v2, v3 = v0 + x * u0, v1 + x * u1, v2 + x * u2, v3 + x * u3
                    v4, v5, v6, v7 = v4 + x * u4, v5 + x * u5, v6 + x * u6, v7 + x * u7
                    w0, w1, w2, w3 = w0 + y * u0, w1 + y * u1, w2 + y * u2, w3 + y * u3
                    w4, w5, w6, w7 = w4 + y * u4, w5 + y * u5, w6 + y * u6, w7 + y * u7
                for k, (v, w) in enumerate(
                    ((v0, w0), (v1, w1), (v2, w2), (v3, w3), (v4, w4), (v5, w5), (v6, w6), (v7, w7))
                ):
                    G[i, j + k] += v
                    G[i + 1, j + k] += w

    return multiply, multiply_transposed, outer


# -- activations -------------------------------------------------------------------------------------------
#
# Each has two functions of a tile. `activate(kept, u, dt, x, bits, power)` turns kept = W u + b into what the adjoint
# needs, act(.) where the derivative is a function of it, and adds dt act(.) to u. `derive(kept, u, dt, w, s, ...)`
# takes dt act(.) away from u and makes s = act'(.) w.


def _relu(number: Any, compile_: Any) -> tuple[Any, Any]:
    zero = number(0)

    def activate(kept: Any, u: Any, dt: Any, x: Any, bits: Any, power: Any) -> None:
        for i in range(kept.shape[0]):
            for t in range(TILE):
                v = max(kept[i, t], zero)
                kept[i, t] = v
                u[i, t] += dt * v

    def derive(kept: Any, u: Any, dt: Any, w: Any, s: Any, x: Any, bits: Any, power: Any) -> None:
        for i in range(kept.shape[0]):
            for t in range(TILE):
                v = kept[i, t]
                u[i, t] -= dt * v
                s[i, t] = w[i, t] if v > zero else zero

    return activate, derive


def _tanh(number: Any, compile_: Any) -> tuple[Any, Any]:
    exponential, one, two = compile_(_exponential(number)), number(1), number(2)

    def activate(kept: Any, u: Any, dt: Any, x: Any, bits: Any, power: Any) -> None:
        for i in range(kept.shape[0]):
            exponential(kept[i], two, x, bits, power)
            for t in range(TILE):  # tanh(a) = q / (q + 2), q = exp(2 a) - 1
                v = x[t] / (x[t] + two)
                kept[i, t] = v
                u[i, t] += dt * v

    def derive(kept: Any, u: Any, dt: Any, w: Any, s: Any, x: Any, bits: Any, power: Any) -> None:
        for i in range(kept.shape[0]):
            for t in range(TILE):
                v = kept[i, t]
                u[i, t] -= dt * v
                s[i, t] = w[i, t] * (one - v * v)

    return activate, derive


def _silu(number: Any, compile_: Any) -> tuple[Any, Any]:
    exponential, one, two = compile_(_exponential(number)), number(1), number(2)

    def activate(kept: Any, u: Any, dt: Any, x: Any, bits: Any, power: Any) -> None:
        for i in range(kept.shape[0]):
            exponential(kept[i], -one, x, bits, power)
            for t in range(TILE):  # a / (1 + exp(-a))
                u[i, t] += dt * kept[i, t] / (x[t] + two)

    def derive(kept: Any, u: Any, dt: Any, w: Any, s: Any, x: Any, bits: Any, power: Any) -> None:
        for i in range(kept.shape[0]):
            exponential(kept[i], -one, x, bits, power)
            for t in range(TILE):
                sigma = one / (x[t] + two)
                u[i, t] -= dt * kept[i, t] * sigma
                s[i, t] = w[i, t] * sigma * (one + kept[i, t] * (one - sigma))

    return activate, derive


ACTIVATIONS = {"relu": _relu, "tanh": _tanh, "silu": _silu}


def _exponential(number: Any) -> Any:
    """q = exp(scale a) - 1, cut off at the largest exponents: 2^k (2^r - 1) + 2^k - 1, |r| <= 1/2, by Taylor's series.

    2^k is made from the bits of its exponent, which two views of one array share, so that the loop has no calls and
    fills vector lanes. Near zero k = 0, and the result is as exact as the series.
    """
    single = number is np.float32
    bias, shift, terms = (127, 23, 7) if single else (1023, 52, 13)
    series = [number(math.log(2.0) ** n / math.factorial(n)) for n in range(1, terms + 1)]
    c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13 = series + [number(0)] * (13 - terms)
    log2e, half, one = number(1.0 / math.log(2.0)), number(0.5), number(1)
    most = number(80.0 if single else 700.0)
    whole = np.int32 if single else np.int64
    bias, shift = whole(bias), whole(shift)

    def exponential(a: Any, scale: Any, q: Any, bits: Any, power: Any) -> None:
        for t in range(TILE):
            y = min(max(scale * a[t], -most), most) * log2e
            k = np.floor(y + half)
            bits[t] = (whole(k) + bias) << shift
            q[t] = y - k
        for t in range(TILE):
            r, p = q[t], c7
            if not single:
                p = c7 + r * (c8 + r * (c9 + r * (c10 + r * (c11 + r * (c12 + r * c13)))))
            p = r * (c1 + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * p))))))
            q[t] = power[t] * p + (power[t] - one)

    return exponential


# -- all layers --------------------------------------------------------------------------------------------


def _load(u: Any, first: int, count: int, tile: Any) -> None:
    """The samples from `first` on as a tile; the last of them stands for those that are missing."""
    for j in range(u.shape[0]):
        for t in range(TILE):
            tile[j, t] = u[j, first + min(t, count - 1)]


def _forward(load: Any, multiply: Any, activate: Any) -> Any:
    """Loops through the layers of chains.

    `forward(u, W, b, dt, m, keep, kept, x, bits, power, end)`: chain k is the layers k m to (k + 1) m of W (layers,
    width, width), b (layers, width), dt (layers,), from the states u[k] (width, samples) to end[k]. kept is (chains,
    tiles, m, width, TILE), or of one tile and layer, used again and again, where `keep` is false. x, bits and power
    are (TILE,), the last two of one memory.
    """

    def forward(
        u: Any, W: Any, b: Any, dt: Any, m: int, keep: bool, kept: Any, x: Any, bits: Any, power: Any, end: Any
    ) -> None:
        chains, width, samples = u.shape
        tile = np.empty((width, TILE), u.dtype)
        for k in range(chains):
            for c in range((samples + TILE - 1) // TILE):
                first, count = c * TILE, min(TILE, samples - c * TILE)
                load(u[k], first, count, tile)
                for i in range(k * m, min((k + 1) * m, W.shape[0])):
                    slot = kept[k, c, i - k * m] if keep else kept[0, 0, 0]
                    multiply(W[i], b[i], tile, slot)
                    activate(slot, tile, dt[i], x, bits, power)
                for j in range(width):
                    for t in range(count):
                        end[k, j, first + t] = tile[j, t]

    return forward


def _backward(zero: Any, load: Any, multiply_transposed: Any, outer: Any, derive: Any) -> Any:
    """Loops backward through the layers of chains.

    `backward(u, w, W, dt, m, kept, of_weights, G, g, x, bits, power, before)`: u are the states after the chains, w
    their cotangents, `before` becomes the cotangents of the states before them. Those of W and b are added to G and
    g, where `of_weights` is true.
    """

    def backward(
        u: Any,
        w: Any,
        W: Any,
        dt: Any,
        m: int,
        kept: Any,
        of_weights: bool,
        G: Any,
        g: Any,
        x: Any,
        bits: Any,
        power: Any,
        before: Any,
    ) -> None:
        chains, width, samples = u.shape
        tile, cotangent = np.empty((width, TILE), u.dtype), np.empty((width, TILE), u.dtype)
        s = np.empty((width, TILE), u.dtype)
        for k in range(chains):
            for c in range((samples + TILE - 1) // TILE):
                first, count = c * TILE, min(TILE, samples - c * TILE)
                load(u[k], first, count, tile)
                load(w[k], first, count, cotangent)
                cotangent[:, count:] = zero
                for i in range(min((k + 1) * m, W.shape[0]) - 1, k * m - 1, -1):
                    derive(kept[k, c, i - k * m], tile, dt[i], cotangent, s, x, bits, power)
                    if of_weights:
                        outer(s, tile, dt[i], zero, G[i], g[i])
                    else:
                        s *= dt[i]
                    multiply_transposed(W[i], s, cotangent)
                for j in range(width):
                    for t in range(count):
                        before[k, j, first + t] = cotangent[j, t]

    return backward
