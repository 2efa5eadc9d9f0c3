"""The layers of a network as stacked parameters: how they are named, changed, saved and read, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.layers.blocks import LayerStack
from nn_adapters.layers.parallelmodule import ParallelModule
from nn_adapters.layers.parts.splines import spline_coefficients
from nn_adapters.layers.parts.stacking import Shelf
from pdeopt.core.errors import InputError


class StackedLayers(ParallelModule):
    """Layers whose parameters and buffers are stacked, those of this rank; they are saved as those of a `LayerStack`.

    Attributes:
        num_steps, Tf: N layers over the time Tf.
        stack: parameters of this rank's layers.
        shelves: the layers of this rank, one shelf for each kind of block in the network.
        stacks: the parameters of this rank's layers, (n_local, ...) for each parameter of a block.
    """

    num_steps: int
    Tf: float
    stack: nn.Module
    shelves: list[Shelf]

    @property
    def stacks(self) -> list[nn.Parameter]:
        """The parameters of this rank's layers, one tensor (n_local, ...) for each parameter of a block."""
        return [stack for shelf in self.shelves for stack in shelf.template.find(shelf.stack)]

    def __len__(self) -> int:
        return self.num_steps

    def _kind(self, layer: int) -> int:
        """Which shelf has what is like this layer, of any rank."""
        return 0

    def _place(self, layer: int) -> tuple[Shelf, int]:
        """The shelf and the row of a layer of this rank."""
        return next((shelf, shelf.layers.index(layer)) for shelf in self.shelves if layer in shelf.layers)

    def __getitem__(self, i: int) -> nn.Module:
        """The module of layer i, 0 the first, -1 the last. Its parameters share the memory of this network's.

        Those of splines are copies.

        Raises:
            IndexError: a layer of another rank, or none.
        """
        at = range(self.num_steps)[index(i)]
        if not self.grid.begin <= at < self.grid.end:
            raise IndexError(f"layer {at} is on another rank; this one has {self.grid.begin} to {self.grid.end - 1}")
        shelf, row = self._place(at)
        return shelf.module(row)

    def layer_stack(self) -> LayerStack:
        """The layers as modules; those of this rank share the memory of its parameters, others are spare copies.

        Raises:
            InputError: weights that are splines, of which layers have copies.
        """
        if spline_coefficients(self):
            raise InputError("weights of layers to be set", "splines in depth", "first weights before use_splines")
        own = range(self.grid.begin, self.grid.end)
        layers = iter([self[i] if i in own else copy.deepcopy(self[own[0]]) for i in range(self.num_steps)])
        return LayerStack(lambda: next(layers), self.num_steps, self.Tf)

    def apply(self, fn: Callable[[nn.Module], None]) -> StackedLayers:
        """Apply a function to the modules of all layers, as initializations do it, then to this one.

        Settings of dropout and batch norms that it changes are those of all layers of a kind, as the first has them.
        """
        layers = self.layer_stack().layers
        layers.apply(fn)
        for shelf in self.shelves:
            for layer in shelf.layers[:1]:
                shelf.template.lead(shelf.stack, layers[layer])
        fn(self)
        return self

    def train(self, mode: bool = True) -> StackedLayers:
        """Training mode, or evaluation mode; the layers have the same, but for those whose own `train` says else."""
        super().train(mode)
        for shelf in self.shelves:
            shelf.template.module.train(mode)
            shelf.template.lead(shelf.stack)
        return self

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply all weights by a number: near zero, layers are alike, and coarse levels see what fine ones do."""
        for parameter in self.stack.parameters():
            parameter.mul_(factor)

    def serial(self) -> LayerStack:
        """The network as PyTorch runs it, with copies of all weights, on every rank. Collective.

        The way back is `load_state_dict(serial.state_dict())`.
        """
        layers = (self.shelves[kind].copied(rows) for kind, rows in self._all_rows())
        stack = LayerStack(lambda: next(layers), self.num_steps, self.Tf)
        stack.training = stack.layers.training = self.training  # modes of layers' parts are theirs
        return stack

    def full_state_dict(self) -> dict[str, Tensor]:
        """The `state_dict` of all layers, on the CPU of every rank, as that of `serial()`. Collective."""
        return {
            f"layers.{i}.{name}": rows[at].clone()
            for i, (kind, rows) in enumerate(self._all_rows())
            for name, at in self.shelves[kind].template.keys
        }

    def _all_rows(self) -> list[tuple[int, list[Tensor]]]:
        """The kind, and parameters and buffers, of each layer of all ranks, in their order, on the CPU."""
        own = [(list(shelf.layers), [tensor.detach().cpu() for tensor in shelf.tensors()]) for shelf in self.shelves]
        found = [
            (layer, kind, [tensor[row] for tensor in tensors])
            for part in self.grid.mpi.allgather(own)
            for kind, (layers, tensors) in enumerate(part)
            for row, layer in enumerate(layers)
        ]
        return [(kind, rows) for _, kind, rows in sorted(found, key=lambda each: each[0])]

    def _keys(self, prefix: str) -> Iterator[tuple[str, Shelf, int, int]]:
        """(key, shelf, tensor, row) of the layers of this rank; what `parametrize` computes is not stored."""
        for layer in range(self.grid.begin, self.grid.end):
            shelf, row = self._place(layer)
            for name, at in shelf.template.keys:
                if shelf.template.is_plain(shelf.stack, at):
                    yield f"{prefix}layers.{layer}.{name}", shelf, at, row

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        tensors = {id(shelf): shelf.tensors() for shelf in self.shelves}
        for key, shelf, at, row in self._keys(prefix):
            value = tensors[id(shelf)][at][row]
            destination[key] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = {
            f"{prefix}layers.{i}.{name}"
            for i in range(self.num_steps)
            for name, _ in self.shelves[self._kind(i)].template.keys
        }
        unexpected_keys += [key for key in state_dict if key.startswith(prefix + "layers.") and key not in known]
        if local_metadata.get("assign_to_params_buffers", False):
            _take_dtypes(self._keys(prefix), state_dict)
        tensors = {id(shelf): shelf.tensors() for shelf in self.shelves}
        for key, shelf, at, row in self._keys(prefix):
            if key not in state_dict:
                missing_keys.append(key)
                continue
            into = tensors[id(shelf)][at]
            got, expected = state_dict[key].shape, into.shape[1:]
            if got != expected:
                error_msgs.append(f"{key}: shape {tuple(got)}, {tuple(expected)} expected")
                continue
            with torch.no_grad():
                into[row] = state_dict[key]


def _take_dtypes(keys: Iterable[tuple[str, Shelf, int, int]], state_dict: dict[str, Any]) -> None:
    """Parameters and buffers of the dtype and on the device of those in a dictionary, as `assign=True` asks for."""
    for key, shelf, at, row in keys:
        if key in state_dict and row == 0:
            stack, value = shelf.tensors()[at], state_dict[key]
            new = torch.empty_like(stack, dtype=value.dtype, device=value.device)
            is_parameter = isinstance(stack, nn.Parameter)
            shelf.template.replace(shelf.stack, at, nn.Parameter(new, stack.requires_grad) if is_parameter else new)
