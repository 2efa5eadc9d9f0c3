"""Where the weights of a network start: He, Glorot, and Box.

Box (E. C. Cyr, M. A. Gulian, R. G. Patel, M. Perego, N. A. Trask, Robust training and initialization of deep
neural networks: An adaptive basis viewpoint, 2020) places the cut of each ReLU neuron inside the box that the
features fill, and scales it so that the box is kept from layer to layer. However deep the network, its features
neither blow up nor collapse into a line.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nn_adapters.layers.blocks import Direct, LayerStack, SteppingBlock
from nn_adapters.layers.layerparallel import LayerParallel
from pdeopt.core.errors import InputError

Generator = torch.Generator | None

#: Initializations by name.
INITIALIZATIONS = ("he", "glorot", "box")

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def initialize(network: nn.Module, kind: str, generator: Generator = None) -> None:
    """Draw new weights of all linear and convolutional layers, in place; other modules stay as they are.

    He: W normal with variance 2 / inputs (K. He, X. Zhang, S. Ren, J. Sun, ICCV 2015, eq. (10)). Glorot: W uniform with
    variance 2 / (inputs + outputs) (X. Glorot, Y. Bengio, AISTATS 2010, eq. (16)). Both with b = 0.

    Box (Cyr and others, 2020, Algorithms 1 and 2): inputs in [0, 1]^d. Linear layers that come before the first
    `LayerStack` or `LayerParallel` by `box_linear`, its layers by `box_stack`; linear layers after it, the head, by
    Glorot. In the order in which the modules were registered.

    Args:
        network: a layer, a stack, a `LayerParallel`, or a module that contains them. Layers in parallel get the weights
            that the same layers in series would get; all ranks draw those of all layers.
        kind: `he`, `glorot` or `box`.
        generator: the source of the random numbers, on the CPU; torch's own by default.

    Raises:
        InputError: another kind, or a layer that it does not know.

    Example:
        >>> stack = LayerStack(lambda: dense(2, "relu"), 128)
        >>> initialize(nn.Sequential(nn.Linear(2, 2), stack, nn.Linear(2, 1)), "box")
    """
    if kind not in INITIALIZATIONS:
        raise InputError("initialization", kind, " | ".join(INITIALIZATIONS))
    with torch.no_grad():
        if kind == "box":
            _box(network, generator)
            return
        for module in _parts(network, set()):
            if isinstance(module, (nn.Linear, *_CONV)):
                _by_variance(module, kind, generator)
            else:
                _refuse_weights(module, kind, "linear layers and convolutions")


def box_linear(layer: nn.Linear, generator: Generator = None) -> None:
    """Box for a layer whose inputs fill [0, 1]^d, in place: the largest value of each neuron there is 1.

    Args:
        layer: whose weights are drawn.
        generator: the source of the random numbers.

    Raises:
        InputError: a layer without a bias.
    """
    one = torch.ones(1, dtype=torch.float64)
    W, b = box_neurons(one, one, layer.out_features, layer.in_features, generator)
    _assign(layer, W[0], b[0])


def box_stack(stack: LayerStack, generator: Generator = None) -> None:
    """Box for a stack whose inputs fill [0, 1]^width, in place.

    Args:
        stack: of layers u + dt relu(W u + b), or relu(W u + b) by `Direct`.
        generator: the source of the random numbers.

    Raises:
        InputError: a block that is not one linear layer, width to width, and its activation.
    """
    layers = [_linear_of(block) for block in stack.layers]
    direct = [isinstance(block, Direct) for block in stack.layers]
    if any(direct) != all(direct):
        raise InputError("box: stack", "residual and direct blocks mixed", "blocks of one kind")
    if all(direct):
        one = torch.ones(len(layers), dtype=torch.float64)
        W, b = box_neurons(one, one, layers[0].out_features, layers[0].in_features, generator)
    else:
        W, b = box_weights(len(layers), layers[0].out_features, generator, dt=stack.dt)
    for layer, weight, bias in zip(layers, W, b):
        _assign(layer, weight, bias)


def box_weights(layers: int, width: int, generator: Generator = None, *, dt: float = 1.0) -> tuple[Tensor, Tensor]:
    """Box weights of the layers u + dt relu(W u + b), l = 1..L, stacked: W (L, width, width) and b (L, width).

    Layer l maps [0, m_l]^width into [0, m_{l+1}]^width with m_l = (1 + 1/L)^(l-1) <= e: the largest value of
    dt (W u + b) over its box is m_l / L in each neuron.

    Args:
        layers, width: L, and the features.
        generator: the source of the random numbers.
        dt: length of a layer.

    Raises:
        InputError: sizes below 1, or a length that is not positive.
    """
    if layers < 1 or width < 1 or not dt > 0:
        raise InputError("box: layers, width, dt", f"{layers}, {width}, {dt}", "layers, width >= 1 and dt > 0")
    m = (1.0 + 1.0 / layers) ** torch.arange(layers, dtype=torch.float64)
    return box_neurons(m, m / (layers * dt), width, width, generator)


def box_neurons(
    side: Tensor, top: Tensor, outputs: int, inputs: int, generator: Generator = None
) -> tuple[Tensor, Tensor]:
    """Neurons w.u + b that vanish at a random point p of [0, side]^inputs and reach `top` in a corner of it.

    p uniform in the box, n uniform on the unit sphere, w = k n and b = -k n.p; the largest value is in the corner
    p_max = side 1[n > 0], so k = top / n.(p_max - p) (Algorithms 1 and 2 of the paper).

    Args:
        side, top: of each layer, (L,), float64.
        outputs, inputs: neurons of a layer, and dimension of the box.
        generator: the source of the random numbers.

    Returns:
        W (L, outputs, inputs) and b (L, outputs).
    """
    shape = (len(side), outputs, inputs)
    eps = torch.finfo(torch.float64).eps
    inside = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(eps, 1.0 - eps)  # k is finite
    p = side[:, None, None] * inside
    n = nn.functional.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
    p_max = side[:, None, None] * (n > 0)
    k = top[:, None] / (n * (p_max - p)).sum(-1)
    return k[..., None] * n, -k * (n * p).sum(-1)


def _in_series(module: nn.Module) -> nn.Module:
    """The module itself, or for layers in parallel the `LayerStack` that shares their memory."""
    return module.layer_stack() if isinstance(module, LayerParallel) else module


def _parts(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    """The module and all inside it, once each, in the order of registration."""
    if id(module) not in seen:
        seen.add(id(module))
        module = _in_series(module)
        yield module
        for child in module.children():
            yield from _parts(child, seen)


def _box(network: nn.Module, generator: Generator) -> None:
    stacked = False
    todo = [network]
    while todo:  # depth first, in the order of registration
        module = _in_series(todo.pop())
        if isinstance(module, LayerStack):
            box_stack(module, generator)
            stacked = True
        elif isinstance(module, nn.Linear):
            if stacked:
                _by_variance(module, "glorot", generator)
            else:
                box_linear(module, generator)
        else:
            _refuse_weights(module, "box", "linear layers and stacks of dense blocks")
            todo.extend(reversed(list(module.children())))


def _by_variance(layer: nn.Module, kind: str, generator: Generator) -> None:
    if kind == "he":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)  # type: ignore[arg-type]
    else:
        nn.init.xavier_uniform_(layer.weight, generator=generator)  # type: ignore[arg-type]
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def _linear_of(block: nn.Module) -> nn.Linear:
    """The one layer with weights of a block."""
    own = [module for module in block.modules() if any(True for _ in module.parameters(recurse=False))]
    square = len(own) == 1 and isinstance(own[0], nn.Linear) and own[0].in_features == own[0].out_features
    if not square or (isinstance(block, SteppingBlock) and not isinstance(block, Direct)):
        raise InputError("box: block", type(block).__name__, "one linear layer, width to width, and its activation")
    return own[0]  # type: ignore[return-value]


def _assign(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    if layer.bias is None:
        raise InputError("box: linear layer", "no bias", "a layer with a bias: it places the neuron's cut")
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


def _refuse_weights(module: nn.Module, kind: str, legal: str) -> None:
    """Raise where a module has matrices of its own that would be passed over in silence."""
    if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        raise InputError(f"{kind}: module", type(module).__name__, legal)
