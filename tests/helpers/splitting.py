"""What holds for every split constraint of layers."""

import numpy as np
import torch


def never_rises(splitting, least=1e-3):
    """No update of three sweeps raises the augmented Lagrangian, and one lowers it by the share `least`."""
    states = splitting.states
    states.multiplier = torch.randn(states.multiplier.shape, generator=torch.Generator().manual_seed(4)).double()
    values = [splitting.lagrangian()]
    for iteration in range(1, 4):
        for block in splitting.sweep(iteration):
            splitting.update(block)
            values.append(splitting.lagrangian())
    falls = -np.diff(values)
    assert falls.min() > -1e-10 * abs(values[0]) and falls.max() >= least * abs(values[0])
