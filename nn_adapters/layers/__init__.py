"""Layers as time steps: blocks, their derivatives, layer-parallel networks, first weights."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
