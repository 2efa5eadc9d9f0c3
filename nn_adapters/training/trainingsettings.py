"""Settings of a training run, and what they name: optimizers, and the course of the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nn_adapters.curvature.choice import SECOND_ORDER, second_order
from nn_adapters.curvature.likelihoods import CrossEntropy
from nn_adapters.curvature.secondorder import SecondOrder
from pdeopt.core.errors import InputError
from pdeopt.core.settings import Settings, setting

#: Optimizers of PyTorch by name; SGD with momentum 0.9.
FIRST_ORDER = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """Training."""

    epochs: int = setting(10, "passes through the training samples", at_least=0)
    batch: int = setting(100, "samples of a batch", at_least=1)
    lr: float = setting(1e-3, "learning rate of adam, sgd and adamw", above=0, at_most=1e30)
    optimizer: str = setting(
        "adam",
        "optimizer of PyTorch, or of second order, which has no learning rate",
        choices=(*FIRST_ORDER, *SECOND_ORDER),
        reads=SECOND_ORDER,
    )
    schedule: str = setting("cosine", "course of the learning rate over the run", choices=("constant", "cosine"))
    tikhonov: float = setting(0.0, "weight of |theta|^2 / 2, theta the parameters of the layers", at_least=0)
    smoothness: float = setting(0.0, "weight of sum |d theta / dt|^2 / 2, differences from layer to layer", at_least=0)
    seed: int = setting(0, "seed of the first weights and of the batches", at_least=0)
    samples: int = setting(0, "training samples that are used; 0 for all", at_least=0)
    bias_limit: float = setting(
        0.1,
        "relative error that gradients of the cycles may have at first, less and less later on; cycles are added and "
        "taken away for that, and where they cannot pay, layers go one after the other; 0 leaves cycles as they are",
        at_least=0,
    )
    bias_every: int = setting(
        100, "batches between exact measurements of the gradient's error, at most; 0 for the end alone", at_least=0
    )
    layer_ranks: int = setting(
        0, "ranks of a group that shares the layers; 0 for one group of all. Groups share each batch", at_least=0
    )
    nested: int = setting(
        1,
        "levels of nested iteration: half the layers on each shallower one, the same work on all, together as much as "
        "-epochs at full depth",
        at_least=1,
    )
    device: str = setting(
        "", "where the network is trained, as PyTorch has it: cpu, cuda, cuda:1, ...; empty for where it is"
    )
    cuda_graphs: str = setting(
        "auto",
        "value and gradient on a GPU by one rank, with an optimizer of PyTorch: as a CUDA graph where that can be, or "
        "by calls alone",
        choices=("auto", "never"),
    )
    checkpoint: str = setting("", "file for checkpoints, written after each epoch")
    restart: str = setting("", "checkpoint from which training goes on")


#: Settings that may change where a run goes on: how far, how fast, on which ranks and device.
FREE = ("epochs", "lr", "schedule", "layer_ranks", "device", "cuda_graphs", "checkpoint", "restart")


def rate_of(settings: TrainingSettings, epoch: int) -> float:
    """The learning rate of an epoch, from 1."""
    share = (epoch - 1) / max(settings.epochs, 1)
    return settings.lr * (0.5 * (1 + math.cos(math.pi * share)) if settings.schedule == "cosine" else 1.0)


def set_rate(optimizer: torch.optim.Optimizer, settings: TrainingSettings, epoch: int) -> None:
    """Let the learning rate follow its schedule; for an optimizer of second order, where one was given to it."""
    rate = rate_of(settings, epoch)
    if isinstance(optimizer, SecondOrder):
        optimizer.course = rate / settings.lr
        return
    for group in optimizer.param_groups:
        group["lr"] = rate


def named_optimizer(network: nn.Module, settings: TrainingSettings, data: Any) -> torch.optim.Optimizer:
    """The optimizer that the settings name, for cross-entropy.

    Args:
        network: whose parameters.
        settings: of the run; an optimizer of second order reads options of its own.
        data: communicator of the ranks that share batches.
    """
    name = settings.optimizer
    if name in SECOND_ORDER:
        return second_order(name, network, CrossEntropy(), settings.seed, data if data.size > 1 else None)
    words = {"momentum": 0.9} if name == "sgd" else {}
    return FIRST_ORDER[name](network.parameters(), lr=settings.lr, **words)


def check_optimizer(optimizer: torch.optim.Optimizer, network: nn.Module, data: Any) -> None:
    """Refuse one of second order of another network, and one that does not know with whom it shares batches."""
    if not isinstance(optimizer, SecondOrder):
        return
    what = f"{type(optimizer).__name__} of a training"
    if optimizer.model.network is not network:
        raise InputError(what, "that of another network", "that of its network")
    ranks = 1 if optimizer.model.team is None else optimizer.model.team.size
    if ranks != data.size:
        raise InputError(what, f"a team of {ranks} where {data.size} groups share a batch", "team=groups.data")
