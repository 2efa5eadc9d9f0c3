"""Parameters and buffers of many modules of one kind, stacked: the leading axis is the layer, names are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from pdeopt.core.errors import InputError


class ParameterStack(nn.Module):
    """The tree of a module's names, whose leaves are parameters and buffers of many such modules, (layers, ...) each.

    `stack.0.weight` holds the weights `layers.{i}.0.weight` of all layers i, so that filters by name find what they
    look for. It is called by nobody, and saves nothing: `LayerParallel` saves layer by layer. Where the module has
    dropout or a batch norm, the tree has one, too, whose settings and mode are those of all layers.

    Args:
        leaves: parameters by their names, with dots.
        buffers: as these.
        settable: parts of the module that have settings, by their names.
    """

    def __init__(
        self,
        leaves: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor] | None = None,
        settable: Mapping[str, nn.Module] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        parts = settable or {}
        for name, parameter in leaves.items():
            path, _, leaf = name.rpartition(".")
            self._node(path, parts).register_parameter(leaf, parameter)
        for name, buffer in (buffers or {}).items():
            path, _, leaf = name.rpartition(".")
            self._node(path, parts).register_buffer(leaf, buffer)
        for name in parts:
            self._node(name, parts)

    def _node(self, path: str, settable: Mapping[str, nn.Module]) -> nn.Module:
        """The node of this path; it and those above it are made where they are missing."""
        node: nn.Module = self
        names = path.split(".") if path else []
        for depth, name in enumerate(names, start=1):
            if name not in node._modules:
                part = settable.get(".".join(names[:depth]))
                node.add_module(name, ParameterStack({}) if part is None else SETTABLE[type(part)](part))
            node = node._modules[name]  # type: ignore[assignment]
        return node

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ParameterStack:
        """As of PyTorch; a memory format that is meant for the axes of one layer's tensor is given to these."""

        def of_layers(rows: Tensor) -> Tensor:
            return fn(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]) if rows.dim() == 5 else fn(rows)

        return super()._apply(of_layers, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        pass

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))


class DropoutStack(ParameterStack, nn.Dropout):
    """The place of `nn.Dropout` in the tree: its share `p`, and its mode.

    Args:
        part: a module of one layer.
    """

    def __init__(self, part: nn.Dropout) -> None:
        nn.Dropout.__init__(self, part.p, part.inplace)
        self.training = part.training

    def extra_repr(self) -> str:
        return nn.Dropout.extra_repr(self)


class BatchNormStack(ParameterStack):
    """The place of a batch norm in the tree: its settings, its mode, and what moves with it, all layers together."""

    def __init__(self, part: Any) -> None:
        words = {"affine": False, "track_running_stats": False}
        nn.modules.batchnorm._BatchNorm.__init__(self, part.num_features, part.eps, part.momentum, **words)  # type: ignore[arg-type]
        self.affine, self.track_running_stats, self.training = part.affine, part.track_running_stats, part.training


class BatchNorm1dStack(BatchNormStack, nn.BatchNorm1d):
    """That of `nn.BatchNorm1d`."""


class BatchNorm2dStack(BatchNormStack, nn.BatchNorm2d):
    """That of `nn.BatchNorm2d`."""


class BatchNorm3dStack(BatchNormStack, nn.BatchNorm3d):
    """That of `nn.BatchNorm3d`."""


#: Modules whose settings are those of a place in the tree, by their exact kind.
SETTABLE: dict[type, Any] = {
    nn.Dropout: DropoutStack,
    nn.BatchNorm1d: BatchNorm1dStack,
    nn.BatchNorm2d: BatchNorm2dStack,
    nn.BatchNorm3d: BatchNorm3dStack,
}

#: These settings, of those that a module has.
SETTINGS = ("p", "eps", "momentum", "training")


def take_settings(part: nn.Module, like: nn.Module) -> None:
    """Give a module what another one has of `SETTINGS`."""
    for name in SETTINGS:
        if name in like.__dict__ and part.__dict__.get(name) != like.__dict__[name]:
            setattr(part, name, like.__dict__[name])


def stack_modules(modules: Sequence[nn.Module], example: nn.Module | None = None) -> ParameterStack:
    """The parameters and buffers of modules of one kind, stacked; copies.

    Args:
        modules: of one kind.
        example: another one, whose shapes count where there are no modules.

    Raises:
        InputError: modules that differ in the names or shapes of their parameters or buffers.
    """
    like = modules[0] if example is None else example
    leaves = {
        name: nn.Parameter(_rows(p, name, [dict(m.named_parameters()).get(name) for m in modules]), p.requires_grad)
        for name, p in like.named_parameters()
    }
    buffers = {
        name: _rows(buffer, name, [dict(m.named_buffers()).get(name) for m in modules])
        for name, buffer in like.named_buffers()
    }
    settable = {name: part for name, part in like.named_modules() if name and type(part) in SETTABLE}
    return ParameterStack(leaves, buffers, settable)


def _rows(example: Tensor, name: str, rows: Sequence[Tensor | None]) -> Tensor:
    if any(row is None or row.shape != example.shape for row in rows):
        raise InputError("block", f"layers that differ in {name}", "modules of one kind and size")
    detached = [row.detach() for row in rows if row is not None]
    return torch.stack(detached) if detached else example.detach().new_empty((0, *example.shape))


class Template:
    """One module of a kind, of which there are many with other parameters and buffers.

    Args:
        module: the one. Its own parameters and buffers count for nothing.

    Attributes:
        module: the same.
        names: of its parameters, in their order; those that it uses twice once.
        buffers: names of its buffers, alike.
        settable: name and module of the parts whose settings are those of the stack.
        keys: (name, index into `names` and then `buffers`) in the order of its `state_dict`, where they stand as often
            as they are used.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.settable = [(name, part) for name, part in module.named_modules() if name and type(part) in SETTABLE]
        self.names = [name for name, _ in module.named_parameters()]
        self.buffers = [name for name, _ in module.named_buffers()]
        at = {id(tensor): index for index, tensor in enumerate((*module.parameters(), *module.buffers()))}
        self.keys = [
            (f"{prefix}{name}", at[id(tensor)])
            for path, part in module.named_modules(remove_duplicate=False)
            for prefix in [f"{path}." if path else ""]
            for name, tensor in (*part._parameters.items(), *part._buffers.items())
            if tensor is not None and name not in part._non_persistent_buffers_set
        ]

    def find(self, stack: ParameterStack) -> list[Any]:
        """The stacked parameters, in the order of the names."""
        return [reduce(getattr, name.split("."), stack) for name in self.names]

    def find_buffers(self, stack: ParameterStack) -> dict[str, Tensor]:
        """The stacked buffers by their names."""
        return {name: reduce(getattr, name.split("."), stack) for name in self.buffers}  # type: ignore[misc]

    def all_of(self, stack: ParameterStack) -> list[Any]:
        """What `keys` counts: parameters, then buffers."""
        return [*self.find(stack), *self.find_buffers(stack).values()]

    def follow(self, stack: ParameterStack) -> None:
        """Take the settings that the stack has."""
        for name, part in self.settable:
            take_settings(part, stack.get_submodule(name))

    def lead(self, stack: ParameterStack, module: nn.Module | None = None) -> None:
        """Give the stack the settings that the module has, or another one of its kind."""
        parts = dict((self.module if module is None else module).named_modules())
        for name, _ in self.settable:
            take_settings(stack.get_submodule(name), parts[name])

    def with_rows(self, rows: Sequence[Tensor]) -> nn.Module:
        """A copy of the module whose parameters, then buffers, share the memory of these tensors."""
        module = copy.deepcopy(self.module)
        own = [*module.parameters(), *module.buffers()]
        new = {
            id(tensor): nn.Parameter(row.detach(), tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else row.detach()
            for tensor, row in zip(own, rows)
        }
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = new[id(tensor)]  # type: ignore[assignment]
        return module

    def replace(self, stack: ParameterStack, at: int, value: nn.Parameter | Tensor) -> None:
        """Put another parameter or buffer in the place of one of the stack's."""
        path, _, leaf = [*self.names, *self.buffers][at].rpartition(".")
        setattr(stack.get_submodule(path), leaf, value)

    def is_plain(self, stack: ParameterStack, at: int) -> bool:
        """Whether the stack has this parameter itself, rather than `torch.nn.utils.parametrize` computing it."""
        path, _, leaf = [*self.names, *self.buffers][at].rpartition(".")
        node = stack.get_submodule(path)
        return leaf in node._parameters or leaf in node._buffers


@dataclass(frozen=True)
class Shelf:
    """The layers of one kind on this rank.

    Attributes:
        template: one of them.
        stack: their parameters and buffers.
        layers: their numbers in the network, row by row.
        begin: how many of the kind are on the ranks before this one.
        total: how many there are on all ranks.
    """

    template: Template
    stack: ParameterStack
    layers: Sequence[int]
    begin: int
    total: int

    @property
    def end(self) -> int:
        """How many of the kind are on the ranks up to this one."""
        return self.begin + len(self.layers)

    def tensors(self) -> list[Any]:
        """Parameters, then buffers, (layers, ...) each."""
        return self.template.all_of(self.stack)

    def module(self, row: int) -> nn.Module:
        """The module of a row, whose parameters and buffers share the memory of the stack's."""
        self.template.follow(self.stack)
        return self.template.with_rows([tensor[row] for tensor in self.tensors()])

    def copied(self, rows: Sequence[Tensor]) -> nn.Module:
        """A module with copies of these parameters and buffers, as the stack's in dtype, device and what is frozen."""
        own = self.tensors()
        self.template.follow(self.stack)
        module = self.template.with_rows([row.to(tensor, copy=True) for row, tensor in zip(rows, own)])
        for parameter, stack in zip(module.parameters(), own):
            parameter.requires_grad_(stack.requires_grad)
        return module
