"""Checkpoints of a training run: parameters, the optimizer's state and the history in one file of safetensors.

A file does not depend on the ranks: the rows of layer-parallel parameters are gathered when it is written, and each
rank takes its own when it is read. Nothing is unpickled.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nn_adapters.layers.layerparallel import LayerParallel
from pdeopt.core.errors import InputError, on_root


def save_checkpoint(
    path: str, network: nn.Module, optimizer: torch.optim.Optimizer, history: Tensor, comm: Any, seed: int = 0
) -> None:
    """Write a checkpoint, in one piece or not at all. Collective.

    Args:
        path: of the file, which is replaced.
        network: whose parameters, those of this rank.
        optimizer: whose state of each parameter.
        history: (epochs, numbers) what is known of the epochs so far.
        comm: communicator of all ranks of the run.
        seed: noted in the file.
    """
    whole = {}
    for key, value in _tensors(network, optimizer).items():
        grid = _grid_of(network, key)
        if grid is not None and value.dim() > 0:
            parts = grid.mpi.gather(value.cpu().numpy())
            value = value if parts is None else torch.from_numpy(np.concatenate(parts))
        whole[key] = value.cpu().contiguous().clone()
    whole["history"] = history

    def write() -> None:
        beside = Path(path).with_name(Path(path).name + ".part")
        save_file(whole, beside, metadata={"pdeopt": "training", "seed": str(seed)})
        os.replace(beside, path)

    on_root(comm, write)


def load_checkpoint(path: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Give the network and the optimizer what a checkpoint holds, written on any number of ranks.

    Args:
        path: of the file.
        network, optimizer: of the same kind as those that were saved.

    Returns:
        The history, (epochs, numbers).

    Raises:
        InputError: a file that is no checkpoint, or that of another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError("-restart", f"{path} ({error})", "a checkpoint of this script") from None
    history: Tensor = stored.pop("history", torch.zeros(0, 4))
    known = dict(network.named_parameters())
    for key, value in stored.items():
        kind, _, name = key.partition(".")
        state, name = name.split(".", 1) if kind == "state" else ("", name)
        if name not in known:
            raise InputError("-restart", f"{path} with a parameter {name}", " | ".join(known))
        grid = _grid_of(network, key)
        own = value[grid.begin : grid.end].clone() if grid is not None and value.dim() > 0 else value
        if value.dim() > 0 and own.shape != known[name].shape:
            raise InputError("-restart", f"{path}: {name} of shape {tuple(value.shape)}", "a network of this size")
        if kind == "parameter":
            with torch.no_grad():
                known[name].copy_(own)
        else:
            optimizer.state[known[name]][state] = own
    return history


def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and the optimizer's state of this rank, by name."""
    found = {}
    for name, parameter in network.named_parameters():
        found[f"parameter.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value):
                found[f"state.{key}.{name}"] = value
    return found


def _grid_of(network: nn.Module, key: str) -> Any:
    """Where the rows of a tensor live; None if all ranks have it."""
    for name, module in network.named_modules():
        inner = f".{name}.stack" if name else ".stack"
        if isinstance(module, LayerParallel) and inner in key:
            return module.grid
    return None
