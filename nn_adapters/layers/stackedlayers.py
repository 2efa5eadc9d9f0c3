"""The layers of a network as stacked parameters: how they are named, changed, saved and read, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nn_adapters.layers.blocks import LayerStack
from nn_adapters.layers.parallelmodule import ParallelModule
from nn_adapters.layers.stacking import ParameterStack, Template


class StackedLayers(ParallelModule):
    """Layers of one kind whose parameters are stacked, those of this rank; they are saved as those of a `LayerStack`.

    Attributes:
        num_steps, Tf: N layers over the time Tf.
        stack: parameters of the layers of this rank, named as those of a block: `stack.0.weight` is (n_local, ...).
        stacks: a list of them.
    """

    num_steps: int
    Tf: float
    stack: ParameterStack
    _template: Template

    @property
    def template(self) -> nn.Module:
        """One block, whose parameters count for nothing."""
        return self._template.module

    @property
    def names(self) -> list[str]:
        """Of the parameters of a block, in the order of `stacks`."""
        return self._template.names

    @property
    def stacks(self) -> list[nn.Parameter]:
        """The parameters of this rank's layers, one tensor (n_local, ...) for each parameter of the block."""
        return self._template.find(self.stack)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, i: int) -> nn.Module:
        """The module of layer i, 0 the first, -1 the last. Its parameters share the memory of this network's.

        Raises:
            IndexError: a layer of another rank, or none.
        """
        at = range(self.num_steps)[i]
        if not self.grid.begin <= at < self.grid.end:
            raise IndexError(f"layer {at} is on another rank; this one has {self.grid.begin} to {self.grid.end - 1}")
        return self._template.with_rows([stack[at - self.grid.begin] for stack in self.stacks])

    def layer_stack(self) -> LayerStack:
        """The layers as modules; those of this rank share the memory of its parameters, others are spare copies."""
        own = range(self.grid.begin, self.grid.end)
        layers = iter([self[i] if i in own else copy.deepcopy(self[own[0]]) for i in range(self.num_steps)])
        return LayerStack(lambda: next(layers), self.num_steps, self.Tf)

    def apply(self, fn: Callable[[nn.Module], None]) -> StackedLayers:
        """Apply a function to the modules of all layers, as initializations do it, then to this one."""
        self.layer_stack().layers.apply(fn)
        return super().apply(fn)

    def train(self, mode: bool = True) -> StackedLayers:
        """Training mode, or evaluation mode; the layers have the same."""
        self.template.train(mode)
        return super().train(mode)

    def serial(self) -> LayerStack:
        """The network as PyTorch runs it, with copies of all weights, on every rank. Collective.

        The way back is `load_state_dict(serial.state_dict())`.
        """
        rows = iter(self._all_rows())
        network = LayerStack(
            lambda: self._template.with_rows([row.to(own, copy=True) for row, own in zip(next(rows), self.stacks)]),
            self.num_steps,
            self.Tf,
        )
        for layer in network.layers:
            for parameter, own in zip(layer.parameters(), self.stacks):
                parameter.requires_grad_(own.requires_grad)
        return network.train(self.training)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The `state_dict` of all layers, on the CPU of every rank, as that of `serial()`. Collective."""
        return {
            f"layers.{i}.{name}": rows[at].clone()
            for i, rows in enumerate(self._all_rows())
            for name, at in self._template.keys
        }

    def _all_rows(self) -> list[list[Tensor]]:
        """The parameters of each layer of all ranks, on the CPU."""
        found = self.grid.mpi.allgather([stack.detach().cpu() for stack in self.stacks])
        counts = np.diff(self.grid.offsets)
        return [[stack[row] for stack in stacks] for stacks, count in zip(found, counts) for row in range(count)]

    def _keys(self, prefix: str) -> Iterator[tuple[str, int, int]]:
        """(key, stack, row) of the layers of this rank; what `parametrize` computes is not stored."""
        names = [(name, at) for name, at in self._template.keys if self._template.is_plain(self.stack, at)]
        for row in range(self.grid.n_local):
            for name, at in names:
                yield f"{prefix}layers.{self.grid.begin + row}.{name}", at, row

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        stacks = self.stacks
        for key, at, row in self._keys(prefix):
            value = stacks[at][row]
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
        known = {f"{prefix}layers.{i}.{name}" for i in range(self.num_steps) for name, _ in self._template.keys}
        unexpected_keys += [key for key in state_dict if key.startswith(prefix + "layers.") and key not in known]
        if local_metadata.get("assign_to_params_buffers", False):
            self._take_dtypes(state_dict, prefix)
        stacks = self.stacks
        for key, at, row in self._keys(prefix):
            if key not in state_dict:
                missing_keys.append(key)
                continue
            got, expected = state_dict[key].shape, stacks[at].shape[1:]
            if got != expected:
                error_msgs.append(f"{key}: shape {tuple(got)}, {tuple(expected)} expected")
                continue
            with torch.no_grad():
                stacks[at][row] = state_dict[key]

    def _take_dtypes(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Parameters of the dtype and on the device of those in a dictionary, as `assign=True` asks for."""
        for key, at, row in self._keys(prefix):
            if key in state_dict and row == 0:
                stack, value = self.stacks[at], state_dict[key]
                new = torch.empty_like(stack, dtype=value.dtype, device=value.device)
                self._template.replace(self.stack, at, nn.Parameter(new, stack.requires_grad))
