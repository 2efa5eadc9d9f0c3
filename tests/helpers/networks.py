"""Networks of PINNs, slowly and obviously right."""

import torch


def network_by_formula(network, theta):
    """The network as its formula says, (points, inputs) -> (points,)."""

    def u(x):
        a, act = x, network.activation
        act = getattr(torch, act) if isinstance(act, str) else act
        *hidden, closing = theta.split(network.sizes)
        for number, (part, (o, i)) in enumerate(zip(hidden, network.shapes)):
            slope = network.slope_scale * part[-1] if network.adaptive else 1.0
            h = act(slope * (a @ part[: o * i].view(o, i).T + part[o * i : o * i + o]))
            a = a + h if number and network.body == "resnet" else h
        return a @ closing[:-1] + closing[-1]

    return u
