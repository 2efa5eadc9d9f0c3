"""PyTorch modules as transient constraints: layers are time steps, weights are controls.

`import nn_adapters as nna` offers layer-parallel networks, losses as smooth functions, physics-informed networks,
training and data. A name is loaded when it is first asked for.
"""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
