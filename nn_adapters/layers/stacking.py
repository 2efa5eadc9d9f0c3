"""Parameters of many modules of one kind, stacked: the leading axis is the layer, names are those of the module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from pdeopt.core.errors import InputError


class ParameterStack(nn.Module):
    """The tree of a module's names, whose leaves are parameters of many such modules, (layers, ...) each.

    `stack.0.weight` holds the weights `layers.{i}.0.weight` of all layers i, so that filters by name find what they
    look for. It is called by nobody, and saves nothing: `LayerParallel` saves layer by layer.

    Args:
        leaves: parameters by their names, with dots.
    """

    def __init__(self, leaves: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in leaves.items():
            node, (*path, leaf) = self, name.split(".")
            for part in path:
                if part not in node._modules:
                    node.add_module(part, ParameterStack({}))
                node = node._modules[part]  # type: ignore[assignment]
            node.register_parameter(leaf, parameter)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        pass

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))


def stack_parameters(modules: Sequence[nn.Module]) -> ParameterStack:
    """The parameters of modules of one kind, stacked; copies.

    Args:
        modules: at least one.

    Raises:
        InputError: modules that differ in the names or shapes of their parameters.
    """
    leaves: dict[str, nn.Parameter] = {}
    for name, example in modules[0].named_parameters():
        rows = [dict(module.named_parameters()).get(name) for module in modules]
        if any(row is None or row.shape != example.shape for row in rows):
            raise InputError("block", f"layers that differ in {name}", "modules of one kind and size")
        values = torch.stack([row.detach() for row in rows])  # type: ignore[union-attr]
        leaves[name] = nn.Parameter(values, requires_grad=example.requires_grad)
    return ParameterStack(leaves)


class Template:
    """One module of a kind, of which there are many with other parameters.

    Args:
        module: the one. Its own parameters count for nothing.

    Attributes:
        module: the same.
        names: of its parameters, in their order; those that it uses twice once.
        keys: (name, index into `names`) in the order of its `state_dict`, where they stand as often as they are used.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names = [name for name, _ in module.named_parameters()]
        at = {id(parameter): index for index, parameter in enumerate(module.parameters())}
        self.keys = [(name, at[id(p)]) for name, p in module.named_parameters(remove_duplicate=False)]

    def find(self, stack: ParameterStack) -> list[Any]:
        """The stacked parameters, in the order of the names."""
        return [reduce(getattr, name.split("."), stack) for name in self.names]

    def with_rows(self, rows: Sequence[Tensor]) -> nn.Module:
        """A copy of the module whose parameters share the memory of these tensors."""
        module = copy.deepcopy(self.module)
        new = {id(p): nn.Parameter(row.detach(), p.requires_grad) for p, row in zip(module.parameters(), rows)}
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
                part.register_parameter(name, new[id(parameter)])
        return module

    def replace(self, stack: ParameterStack, at: int, parameter: nn.Parameter) -> None:
        """Put another parameter in the place of one of the stack's."""
        path, _, leaf = self.names[at].rpartition(".")
        stack.get_submodule(path).register_parameter(leaf, parameter)

    def is_plain(self, stack: ParameterStack, at: int) -> bool:
        """Whether the stack has this parameter itself, rather than `torch.nn.utils.parametrize` computing it."""
        path, _, leaf = self.names[at].rpartition(".")
        return leaf in stack.get_submodule(path)._parameters


def check_fresh(modules: Sequence[nn.Module]) -> None:
    """Raise where two modules share a parameter.

    Raises:
        InputError: a function that does not make new modules.
    """
    seen: set[int] = set()
    for module in modules:
        own = {id(parameter) for parameter in module.parameters()}
        if own & seen:
            raise InputError("block", "the same parameters for several layers", "a function that makes a new module")
        seen |= own
