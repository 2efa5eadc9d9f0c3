"""PyTorch modules as transient constraints: layers are time steps, weights are controls.

`import nn_adapters as nna` offers layer-parallel networks, losses as smooth functions, physics-informed networks,
training and data. A name is loaded when it is first asked for. Rooms, in the order in which they know each other:

    data      sets of samples and their formats
    layers    blocks, first weights, layer-parallel networks, a network as a constraint
    losses    losses of networks as smooth functions, hierarchies in depth
    pinn      physics-informed networks, alone
    training  what a training run needs beside an optimizer
    compression  trained networks made smaller
"""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
