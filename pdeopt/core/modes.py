"""Where and when pdeopt computes, whatever PyTorch's default device and however many threads call it.

Vectors of PETSc live in the memory of the CPU, and PETSc and PyTorch's forward differentiation serve one thread at a
time. (Inference mode, default types and switched-off gradients need nothing: no tensor here depends on them.)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_turn = threading.RLock()


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """A function during which the CPU is PyTorch's default device, for users' functions that it calls, too."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return call


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """A function that one thread at a time runs: a solve in another thread is waited for. It may call itself."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _turn:
            return function(*args, **kwargs)

    return call
