"""Slow and obviously right: dense Fisher matrices, and gradients of single samples."""

import torch
from torch import nn

from nn_adapters.curvature.layers import curved_layers
from nn_adapters.curvature.products import flat


def jacobians(network, x):
    """d outputs of a sample / d parameters, (samples, outputs, size), by one backward pass an entry."""
    layers = curved_layers(network)
    parameters = [p for layer in layers for p in layer.parameters]
    outputs = network(x).flatten(1)
    rows = []
    for entry in outputs.reshape(-1):
        found = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        parts = iter(torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters))
        rows.append(flat(layers, [[next(parts) for _ in layer.parameters] for layer in layers]))
    return torch.stack(rows).reshape(*outputs.shape, -1)


def dense_fisher(network, likelihood, x):
    """weight sum_s J'HJ, H by second derivatives of the loss itself."""
    J, outputs = jacobians(network, x), network(x).detach()
    total = torch.zeros(J.shape[2], J.shape[2], dtype=J.dtype)
    for sample, output in zip(J, outputs):
        target = torch.zeros((), dtype=torch.int64) if output.dim() == 1 and _classifies(likelihood) else 0.0 * output
        H = _hessian(likelihood, output, target)
        total += sample.T @ H @ sample
    return total * likelihood.weight(len(x))


def _hessian(likelihood, output, target):
    def loss(o):
        return likelihood.each(o.reshape(1, *output.shape), target[None]).sum()

    return torch.func.hessian(loss)(output.reshape(-1))


def _classifies(likelihood):
    return type(likelihood).__name__ == "CrossEntropy"


def problem(seed=0, samples=40):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    return network, x, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1)


def closure_of(optimizer, network, loss, x, y):
    def closure():
        optimizer.zero_grad()
        value = loss(network(x), y)
        value.backward()
        return value

    return closure


def train(optimizer, network, loss, x, y, steps, begin=0, batch=10):
    losses = []
    for k in range(begin, begin + steps):
        rows = torch.arange(k * batch, (k + 1) * batch) % len(x)
        losses.append(float(optimizer.step(closure_of(optimizer, network, loss, x[rows], y[rows])).detach()))
    return losses


def flat_gradient(network, loss, x, y, l2=0.0):
    """The gradient with its regularization, in the order of Kronecker blocks; the network's own are added to."""
    loss(network(x), y).backward()
    layers = curved_layers(network)
    return flat(layers, [[p.grad + l2 * p.detach() for p in layer.parameters] for layer in layers])
