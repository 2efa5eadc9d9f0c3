"""Where points are evaluated, and the two ways between that device and the host, which has the parameters.

Methods that find parameters stay on the host, in double precision: vectors of weights are short. Points, jets,
features, lifts, factors and given numbers lie on the device. An evaluation sends the parameters there, `across`, once,
and takes what it found `home`, once: nothing between waits for the device, or mixes its tensors with those of the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

HOST = torch.device("cpu")


def across(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on the device: the same tensor where that is the host."""
    return numbers if device.type == "cpu" else numbers.to(device)


def home(found: Tensor) -> Tensor:
    """What was found on a device, on the host: the same tensor where it was found there. It waits for the device."""
    return found.cpu()
