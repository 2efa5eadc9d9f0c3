"""Whether modules are of one kind: alike but for the numbers in their parameters and buffers.

Layers of a kind are evaluated together, by one of them with the numbers of the others. What they may differ in besides,
as a slope, a probability, or a number of the layer that scales it, would be that of the one for all.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from pdeopt.core.errors import InputError

#: What PyTorch keeps in a module for itself, and what is compared in its own way.
_KEPT = frozenset(vars(nn.Module()))

#: Values that are compared as they are written.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)


def kind_of(module: nn.Module) -> dict[str, Hashable]:
    """What modules of one kind have in common, by names: shapes, modes and settings of all parts.

    Args:
        module: any.

    Raises:
        InputError: a part whose weight is computed by a hook, as old `weight_norm` and pruning do it.
    """
    found: dict[str, Hashable] = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        found[path or "kind"] = f"{type(part).__module__}.{type(part).__qualname__}"
        found[f"{prefix}training"] = part.training
        found[f"{prefix}hooks"] = (len(part._forward_hooks), len(part._forward_pre_hooks))
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                found[f"{prefix}{name}"] = (tuple(tensor.shape), tensor.dtype)
                found[f"{prefix}{name}.requires_grad"] = tensor.requires_grad
        for name, value in vars(part).items():
            if name not in _KEPT:
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    got = f"{name} of {type(part).__name__}, which a hook computes"
                    raise InputError("block", got, "torch.nn.utils.parametrizations, or prune.remove")
                found[f"{prefix}{name}"] = _sign(value)
    return found


def _sign(value: Any) -> Hashable:
    """Equal for values that are alike; of objects that are unknown, their type."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (list, tuple, torch.Size)):
        return type(value).__name__, *map(_sign, value)
    if isinstance(value, Mapping):
        return type(value).__name__, *((_sign(key), _sign(each)) for key, each in value.items())
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter) or value.device.type == "meta" or value.is_sparse:
            return tuple(value.shape), value.dtype
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return tuple(value.shape), value.dtype, numbers
    if isinstance(value, FunctionType):
        held = [*inspect.getclosurevars(value).nonlocals.values(), *(value.__defaults__ or ())]
        return value.__code__, *(repr(each) for each in held if isinstance(each, _PLAIN))
    if isinstance(value, partial):
        return _sign(value.func), _sign(value.args), _sign(value.keywords)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__qualname__, *((f.name, _sign(getattr(value, f.name))) for f in fields(value))
    return type(value).__qualname__


class Likeness:
    """Looks at the layers of a network, one after the other: are they of one kind, and does each have its own weights?

    Args:
        alike: whether they must be of one kind.
    """

    def __init__(self, alike: bool = True) -> None:
        self.alike = alike
        self.count = 0
        self._first: dict[str, Hashable] = {}
        self._seen: dict[int, Any] = {}

    def look(self, layer: nn.Module) -> dict[str, Hashable]:
        """The kind of the next layer.

        Raises:
            InputError: a layer that differs from the first, or shares a parameter with another.
        """
        for parameter in layer.parameters():
            known = self._seen.get(id(parameter))
            if known is not None and known() is parameter:
                got = "the same parameters for several layers"
                raise InputError("block", got, "a function that makes a new module")
        self._seen |= {id(parameter): ref(parameter) for parameter in layer.parameters()}
        kind = kind_of(layer)
        first = self._first = self._first or kind
        for name in (*kind, *first) if self.alike and kind != first else ():
            if kind.get(name) != first.get(name):
                words = " and ".join(_word(each, name) for each in (first, kind))
                got = f"layers 0 and {self.count} that differ in {name}: {words}"
                legal = "modules of one kind and size, with numbers of their own; unlike ones are for a LayerList"
                raise InputError("block", got, legal)
        self.count += 1
        return kind


def _word(kind: Mapping[str, Hashable], name: str) -> str:
    """A value for a message."""
    text = str(kind.get(name, "none"))
    return text if len(text) <= 60 else f"{text[:57]}..."
