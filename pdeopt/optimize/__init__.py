"""Optimizers: each says which way; `iterate` is their one loop.

The names below are loaded when they are first asked for, so that `-tao_type python -tao_python_type
pdeopt.optimize.SSBroyden` finds them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULE = {
    "LBFGS": "quasinewton",
    "SSBroyden": "quasinewton",
    "SPQN": "schwarz",
    "TrustRegionMinimizer": "trust",
    "APTS": "apts",
    "MGOPT": "multilevel",
    "RMTR": "rmtr",
    "MLVR": "mlvr",
    "ASTROM": "astrom",
}

__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'pdeopt.optimize' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"pdeopt.optimize.descent.{_MODULE[name]}"), name)
