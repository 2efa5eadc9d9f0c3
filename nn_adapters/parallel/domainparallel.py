"""Convolutional networks whose images are cut in rows, with halos: the numbers of the serial network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn_adapters.layers.batching import ENTRYWISE_MODULES
from nn_adapters.parallel.imagerows import ImageRows, Range
from pdeopt.core.errors import InputError
from pdeopt.core.messages import PRECISIONS, Messages

LEGAL_LAYERS = "Conv2d with zeros around, MaxPool2d, AvgPool2d, activations of each entry, Sequential of them"


class DomainParallel(nn.Module):
    """Convolutions, pooling and activations of images whose rows are shared by ranks. Collective, backward, too.

    Every rank gives the same images and gets the same features back, all rows of them; between the layers a rank has
    its own rows, and fetches the few beside them that a kernel reaches. So activations take a share of the memory.
    Values and gradients are those of the serial network, to rounding, on all ranks the same: gradients of the weights
    are summed over the ranks in the backward pass, those of the images come back whole.

    Strides, dilation, groups, any padding of zeros, and kernels that reach over several ranks are served. What needs
    all rows at once comes after the body, as in the example, and is done by all ranks.

    Args:
        body: of `LEGAL_LAYERS`; its modules are used as they are, so that keys are "body.0.weight".
        comm: an mpi4py communicator, as `Groups.domain`.

    Raises:
        InputError: another layer, by name; when called, fewer rows than ranks after some layer.

    Example:
        >>> body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        >>> network = nn.Sequential(DomainParallel(body, MPI.COMM_WORLD), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))
    """

    def __init__(self, body: nn.Sequential, comm: Any) -> None:
        super().__init__()
        self.body, self.rows = body, ImageRows(comm)
        self._sums: dict[nn.Module, Messages] = {}
        for layer in _leaves(body):
            require_rows(layer)

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far: halos, rows that are joined, and gradients of weights."""
        return self.rows.sent + sum(each.sent for each in self._sums.values())

    def forward(self, x: Tensor) -> Tensor:
        """Features of images (batch, channels, height, width), or of one without the first axis."""
        height, own = x.shape[-2], self.rows.cut(x)
        for layer in _leaves(self.body):
            if type(layer) in ENTRYWISE_MODULES:
                own = layer(own)
            else:
                own, height = self._window(layer, own, height)
        return self.rows.join(own, height)

    def _window(self, layer: Any, own: Tensor, height: int) -> tuple[Tensor, int]:
        """This rank's rows of what a layer makes of windows, and the height of the image then."""
        reach, (left, right, top, bottom) = Reach.of(layer), padding(layer)
        after = reach.height(height + top + bottom)
        ranges = self.rows.ranges(after)
        wanted = [reach.rows(each, top) for each in ranges]
        inside = [(max(low, 0), min(high, height)) for low, high in wanted]
        if any(low >= high for low, high in inside):
            raise InputError("ranks that share an image", self.rows.comm.size, "fewer: some have zeros around it alone")
        (low, high), (first, last) = wanted[self.rows.comm.rank], inside[self.rows.comm.rank]
        around = (left, right, first - low, high - last)
        return self._apply(layer, self.rows.fetch(own, height, inside), around), after

    def _apply(self, layer: Any, x: Tensor, around: tuple[int, int, int, int]) -> Tensor:
        if isinstance(layer, nn.MaxPool2d):
            x = F.pad(x, around, value=-math.inf)
            return F.max_pool2d(x, layer.kernel_size, layer.stride, 0, layer.dilation)
        x = F.pad(x, around)
        if isinstance(layer, nn.AvgPool2d):
            return F.avg_pool2d(x, layer.kernel_size, layer.stride, divisor_override=layer.divisor_override)
        weight, *bias = self._shared(layer)
        return F.conv2d(x, weight, bias[0] if bias else None, layer.stride, 0, layer.dilation, layer.groups)

    def _shared(self, layer: nn.Module) -> tuple[Tensor, ...]:
        """Parameters whose derivatives are those of all ranks' rows."""
        parameters = list(layer.parameters())
        if layer not in self._sums:
            size, dtype = sum(p.numel() for p in parameters), parameters[0].dtype
            name = next((name for name, each in PRECISIONS.items() if each == dtype), "float32")
            self._sums[layer] = Messages(self.rows.comm, size, name)
        found: tuple[Tensor, ...] = _Shared.apply(self._sums[layer], *parameters)
        return found


class _Shared(torch.autograd.Function):
    """Parameters forward; backward, the sum of the ranks' derivatives."""

    @staticmethod
    def forward(ctx: Any, sums: Messages, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.sums, ctx.shapes = sums, [p.shape for p in parameters]
        return tuple(p.clone() for p in parameters)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:  # type: ignore[override]
        total = ctx.sums.sum(torch.cat([each.reshape(-1) for each in g]))
        parts = total.split([shape.numel() for shape in ctx.shapes])
        return None, *(part.reshape(shape) for part, shape in zip(parts, ctx.shapes))


@dataclass(frozen=True)
class Reach:
    """How far a window reaches down an image.

    Attributes:
        size: of the kernel.
        stride, dilation: of it.
    """

    size: int
    stride: int
    dilation: int

    @classmethod
    def of(cls, layer: Any) -> Reach:
        """That of a convolution or pooling."""
        return cls(*(_pair(getattr(layer, name, 1))[0] for name in ("kernel_size", "stride", "dilation")))

    @property
    def rows_of_window(self) -> int:
        """Rows from the first to the last of a window."""
        return self.dilation * (self.size - 1) + 1

    def height(self, before: int) -> int:
        """Of what comes out, from that of the padded image."""
        return (before - self.rows_of_window) // self.stride + 1

    def rows(self, after: Range, top: int) -> Range:
        """The rows that some rows after the layer come from; negative ones and those beyond are padding."""
        first, last = after
        return first * self.stride - top, (last - 1) * self.stride - top + self.rows_of_window


def padding(layer: Any) -> tuple[int, int, int, int]:
    """Zeros to the left, to the right, above and below an image."""
    if layer.padding == "same":
        across, down = (each * (size - 1) for each, size in zip(reversed(layer.dilation), reversed(layer.kernel_size)))
        return across // 2, across - across // 2, down // 2, down - down // 2
    down, across = _pair(0 if layer.padding == "valid" else layer.padding)
    return across, across, down, down


def require_rows(layer: nn.Module) -> None:
    """Refuse a layer that is none of `LEGAL_LAYERS`.

    Raises:
        InputError: it names the layer.
    """
    plain = not (layer._forward_hooks or layer._forward_pre_hooks)
    served = type(layer) in (*ENTRYWISE_MODULES, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d) and plain
    if served and type(layer) is nn.Conv2d:
        served = layer.padding_mode == "zeros"  # type: ignore[attr-defined]
    if served and type(layer) in (nn.MaxPool2d, nn.AvgPool2d):
        served = not (layer.ceil_mode or getattr(layer, "return_indices", False))
        served &= padding(layer) == (0, 0, 0, 0) or getattr(layer, "count_include_pad", True)
    if not served:
        raise InputError("layer of an image cut in rows", layer, LEGAL_LAYERS)


def _leaves(body: nn.Sequential) -> list[nn.Module]:
    """Layers in order, those of inner Sequentials, too."""
    return [leaf for part in body for leaf in (_leaves(part) if type(part) is nn.Sequential else [part])]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
