"""Networks of dense layers on jets: one flat vector of parameters, forward and backward sweeps from any layer on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from nn_adapters.pinn.activations import Pointwise, check_activation, writing
from nn_adapters.pinn.jets import ActivatedLayer, JetBasis, activate_jets
from pdeopt.core.errors import InputError

NETWORK_BODIES = ("mlp", "resnet")


@dataclass(frozen=True)
class DenseLayer:
    """W, (outputs, inputs), b, (outputs,), and the slope c of act(c (W a + b))."""

    W: Tensor
    b: Tensor
    slope: float = 1.0


@dataclass(frozen=True)
class Network:
    """The shape of a network: a_1 = act(W a_0 + b); a_{l+1} = act(W a_l + b); u = W a_L + b, one field or several.

    In a resnet a_{l+1} = a_l + act(W a_l + b) for l >= 1. With adaptive slopes act(z) is act(n s_l z), n fixed and
    s_l, of layer l, a parameter that starts at 1/n (A. D. Jagtap, K. Kawaguchi, G. E. Karniadakis, Proc. R. Soc. A 476,
    2020). It holds no parameters: these are one flat vector theta, (size,), layer after layer W, b, s.

    Args:
        inputs: number of inputs.
        hidden: widths of the hidden layers, such as (20, 20, 20).
        body: "mlp" or "resnet".
        activation: one of `ACTIVATION_NAMES`, or a smooth function of torch operations, entry by entry: torch then
            differentiates it, which takes eight times as long as the formulas of tanh and sin, or more.
        adaptive: whether there are slopes.
        slope_scale: n.
        outputs: number of fields.

    Raises:
        InputError: no layers, widths below 1 or, in a resnet, of several sizes; an unknown body, or an
            activation that `check_activation` refuses.
    """

    inputs: int
    hidden: tuple[int, ...]
    body: str = "mlp"
    activation: str | Pointwise = "tanh"
    adaptive: bool = False
    slope_scale: float = 1.0
    outputs: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if not self.hidden or min(self.hidden) < 1 or self.inputs < 1:
            raise InputError("network", f"{self.inputs} inputs, layers {self.hidden}", "inputs, layers, widths >= 1")
        if self.body not in NETWORK_BODIES:
            raise InputError("body of a network", self.body, " | ".join(NETWORK_BODIES))
        check_activation(self.activation)
        if self.body == "resnet" and len(set(self.hidden)) > 1:
            raise InputError("layers of a resnet", self.hidden, "layers of one width")
        if self.outputs < 1:
            raise InputError("outputs of a network", self.outputs, "fields, >= 1")
        if not self.slope_scale > 0:
            raise InputError("scale of the slopes", self.slope_scale, "a number > 0")

    @property
    def depth(self) -> int:
        """Number of hidden layers."""
        return len(self.hidden)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of W in each layer, the closing one too."""
        return [(after, before) for before, after in pairwise([self.inputs, *self.hidden, self.outputs])]

    @property
    def sizes(self) -> list[int]:
        """Number of parameters of each layer, the closing one too."""
        return [o * i + o + (self.adaptive and l < self.depth) for l, (o, i) in enumerate(self.shapes)]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(self.sizes)

    def initial(self, seed: int = 0) -> Tensor:
        """First parameters, (size,): W uniform with variance 2 / (inputs + outputs), b = 0, slopes 1/n.

        X. Glorot, Y. Bengio, AISTATS 2010, eq. (16).
        """
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for layer, (o, i) in enumerate(self.shapes):
            bound = (6.0 / (o + i)) ** 0.5
            parts.append((2.0 * torch.rand(o * i, generator=generator, dtype=torch.float64) - 1.0) * bound)
            parts.append(torch.zeros(o, dtype=torch.float64))
            if self.adaptive and layer < self.depth:
                parts.append(torch.full((1,), 1.0 / self.slope_scale, dtype=torch.float64))
        return torch.cat(parts)

    def layers(self, theta: Tensor, first: int = 0, there: Tensor | None = None) -> list[DenseLayer]:
        """Views of the parameters of the layers from `first` on, in theta, which holds these only, flat.

        Args:
            there: the same numbers on a device, where the views are then; slopes are read on the host.
        """
        found, sizes = [], self.sizes[first:]
        own = theta.split(sizes)
        for (o, i), numbers, part in zip(self.shapes[first:], own, own if there is None else there.split(sizes)):
            slope = self.slope_scale * float(numbers[-1]) if len(numbers) > o * i + o else 1.0
            found.append(DenseLayer(part[: o * i].view(o, i), part[o * i : o * i + o], slope))
        return found

    def whole_layers(self, indices: Tensor) -> tuple[int, int] | None:
        """First and last layer of parameters that are those of some layers in a row; None if they are not."""
        starts = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        begin, end = int(indices[0]), int(indices[-1]) + 1
        whole = begin in starts and end in starts and end - begin == len(indices)
        return (starts.index(begin), starts.index(end) - 1) if whole else None

    def flat_gradient(self, layers: list[DenseLayer], gradients: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The gradient by W, b and slope of some layers in a row, flat, from that by c W and c b.

        Args:
            layers: these and those behind, with their slopes c.
            gradients: by c W and c b of these layers.
        """
        parts = []
        for layer, (W, b) in zip(layers, gradients):
            parts += [layer.slope * W.flatten(), layer.slope * b]
            if self.adaptive and layer is not layers[-1]:
                parts.append(self.slope_scale * ((layer.W * W).sum() + (layer.b * b).sum())[None])
        return torch.cat(parts)

    def directions(self, layers: list[DenseLayer], d: Tensor, there: Tensor | None = None) -> list[DenseLayer]:
        """The changes of c W and c b, to first order, for the change d, (size,), of W, b and slopes.

        Args:
            layers: with their slopes.
            d: on the host.
            there: the same numbers on the device of the layers.
        """
        found, own = [], d.split(self.sizes)
        for layer, numbers, part in zip(layers, own, own if there is None else there.split(self.sizes)):
            o, i = layer.W.shape
            W, b = layer.slope * part[: o * i].view(o, i), layer.slope * part[o * i : o * i + o]
            c = self.slope_scale * float(numbers[-1]) if len(numbers) > o * i + o else 0.0
            found.append(DenseLayer(W + c * layer.W, b + c * layer.b) if c else DenseLayer(W, b))
        return found

    def jets(self, theta: Tensor, basis: JetBasis, inputs: Tensor) -> Tensor:
        """Jets of u, (J, fields, points), by operations that `torch.func` differentiates.

        Args:
            theta: parameters, (size,).
            basis: rows of the jets.
            inputs: jets of the inputs, (J, inputs, points).
        """
        a = z = inputs
        for l, ((o, i), part) in enumerate(zip(self.shapes, theta.split(self.sizes))):
            z, bias = part[: o * i].view(o, i) @ a, part[o * i : o * i + o, None]
            z = torch.cat([z[:1] + bias, z[1:]])
            if l < self.depth:
                h = activate_jets(basis, self.activation, z * (self.slope_scale * part[-1]) if self.adaptive else z)
                a = a + h if l and self.body == "resnet" else h
        return z


class JetSweep:
    """Jets through the layers of a network, and cotangents back, for a fixed number of points.

    All arrays are made here, once: fresh ones at every call would cost as much as the arithmetic. A sweep holds what
    the last `forward` left; `backward` uses it.

    Args:
        network: whose layers.
        basis: rows of the jets.
        points: columns.
        device: of the arrays; the host by default.
    """

    def __init__(self, network: Network, basis: JetBasis, points: int, device: torch.device | None = None) -> None:
        self.network, self.rows = network, len(basis)
        act = writing(network.activation)
        self.hidden = [ActivatedLayer(basis, act, width, points, device) for width in network.hidden]
        make = partial(torch.empty, dtype=torch.float64, device=device)
        pairs = {width: make(2, self.rows, width, points).unbind() for width in network.hidden}
        self._cotangents = [pairs[width] for width in network.hidden]
        self._out = make(self.rows, network.outputs, points)

    def forward(self, layers: list[DenseLayer], jets: Tensor, first: int = 0) -> Tensor:
        """Jets of u, (J, fields, points), from those at the input of layer `first`, (J, width, points).

        Args:
            layers: from `first` to the closing one, with slopes in W and b; see `absorb_slopes`.
        """
        a = self.through(layers[:-1], jets, first)
        self._inputs[-1] = a
        torch.bmm(self._expand(layers[-1].W), a, out=self._out)
        self._out[0] += layers[-1].b[:, None]
        return self._out

    def through(self, layers: list[DenseLayer], jets: Tensor, first: int = 0) -> Tensor:
        """Jets behind some hidden layers, (J, width, points); they belong to this object."""
        self.first, self._layers, self._inputs = first, layers, [jets] * (len(layers) + 1)
        a = jets
        for number, (layer, hidden) in enumerate(zip(layers, self.hidden[first:])):
            self._inputs[number] = a
            torch.bmm(self._expand(layer.W), a, out=hidden.z)
            hidden.z[0] += layer.b[:, None]
            out = hidden.forward()
            a = out.add_(a) if self._residual(first + number) else out
        return a

    def backward(self, closing: DenseLayer, w: Tensor, gradients: list[tuple[Tensor, Tensor]], last: int) -> None:
        """Add the derivatives by W and b of the layers `first` to `last`, where the last `forward` went.

        Args:
            closing: layer.
            w: cotangent of the jets of u, (J, fields, points).
            gradients: (W, b) of these layers, to which it is added.
        """

        def add(number: int, z: Tensor, a: Tensor) -> None:
            gradients[number][0].add_(torch.bmm(z, a.transpose(1, 2)).sum(0))
            gradients[number][1].add_(z[0].sum(1))

        self._back(closing, w, add, last)

    def jacobian(self, layers: list[DenseLayer], w: Tensor, rows: Tensor, begin: int = 0) -> None:
        """Write the derivatives of w.(jets of u) by parameters, point by point, where the last `forward` went.

        dr_p / dW_oi = sum_j z[j, o, p] a[j, i, p], z the cotangents and a the inputs of a layer: the products that a
        gradient sums over the points are kept.

        Args:
            layers: all, with their slopes; `forward` had the same ones without.
            w: cotangent of the jets of u at each point, (J, fields, points).
            rows: (points, k), which is overwritten.
            begin: the first of the k parameters.
        """
        network, end = self.network, begin + rows.shape[1]
        starts = [0, *accumulate(network.sizes)]

        def put(place: int, values: Tensor, slope: float) -> None:
            """The derivatives by the parameters from `place` on, as far as they are asked for."""
            a, b = max(place, begin), min(place + values.shape[1], end)
            if a < b:
                torch.mul(values[:, a - place : b - place], slope, out=rows[:, a - begin : b - begin])

        def write(number: int, z: Tensor, a: Tensor) -> None:
            layer, place = layers[number], starts[number]
            (o, i), has_slope = layer.W.shape, network.adaptive and number < network.depth
            first, last = (0, o) if has_slope else (max(0, (begin - place) // i), min(o, -(-(end - place) // i)))
            if first < last:
                own = z[:, first:last].permute(2, 1, 0).contiguous()
                weights = torch.bmm(own, a.permute(2, 0, 1).contiguous()).view(-1, (last - first) * i)
                put(place + first * i, weights, layer.slope)
            put(place + o * i, z[0].T, layer.slope)
            if has_slope:
                slopes = weights @ layer.W.flatten() + layer.b @ z[0]
                put(place + o * i + o, slopes[:, None], network.slope_scale)

        self._back(layers[-1], w, write, network.depth, [begin < last for last in starts[1:]].index(True))

    def tangent(self, layers: list[DenseLayer], directions: list[DenseLayer]) -> Tensor:
        """The derivative of the jets of u, (J, fields, points), along a direction of W and b, at the last `forward`.

        Args:
            layers, directions: from `first` to the closing one, with slopes in W and b, and what is added to them.
        """
        v: Tensor | None = None
        for number, (layer, d) in enumerate(zip(layers, directions)):
            z = torch.matmul(d.W, self._inputs[number])
            z[0] += d.b[:, None]
            z = z if v is None else z.baddbmm_(self._expand(layer.W), v)
            if number == len(layers) - 1:
                break
            out = self.hidden[self.first + number].tangent(z)
            v = out.add_(v) if v is not None and self._residual(self.first + number) else out
        return z

    def _back(
        self, closing: DenseLayer, w: Tensor, take: Callable[[int, Tensor, Tensor], None], last: int, lowest: int = 0
    ) -> None:
        """Carry a cotangent back; `take` gets those of W a + b and the inputs a of each layer from `last` on down.

        Args:
            lowest: of the layers that are wanted; those below are left out.
        """
        if last == self.network.depth:
            take(last - self.first, w, self._inputs[-1])
        if self.first == self.network.depth:
            return
        v, _ = self._cotangents[-1]
        if len(closing.W) == 1:
            torch.mul(closing.W.T, w, out=v)
        else:
            torch.bmm(self._expand(closing.W.T), w, out=v)
        for number in reversed(range(lowest, len(self._layers))):
            l = self.first + number
            z = self.hidden[l].back(v, _other(self._cotangents[l], v))
            if l <= last:
                take(number, z, self._inputs[number])
            if number > lowest:
                W = self._expand(self._layers[number].W.T)
                if self._residual(l):
                    v.baddbmm_(W, z)
                else:
                    v = torch.bmm(W, z, out=_other(self._cotangents[l - 1], z))

    def _expand(self, W: Tensor) -> Tensor:
        return W.expand(self.rows, *W.shape)

    def _residual(self, layer: int) -> bool:
        return layer > 0 and self.network.body == "resnet"


def _other(pair: tuple[Tensor, ...], one: Tensor) -> Tensor:
    """Of two arrays one that is not in use."""
    return pair[1] if one is pair[0] else pair[0]


def absorb_slopes(layers: list[DenseLayer]) -> list[DenseLayer]:
    """The same layers with slope 1, whose weights are c W and c b."""
    return [
        DenseLayer(layer.slope * layer.W, layer.slope * layer.b) if layer.slope != 1.0 else layer for layer in layers
    ]
