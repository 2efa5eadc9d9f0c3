"""Networks on a GPU, value and gradient. Dense ones: eager, compiled, one CUDA graph of the serial chain, and MGRIT,
by calls and as one CUDA graph.

python -m problems.benchmarks.gpu                        # make bench-gpu: within five minutes
python -m problems.benchmarks.gpu -device cpu -layers 64 -widths 8 -samples 50 -pinns 4x20 -points 500

Milliseconds by the clock between two synchronizations, the least of a few calls. The chain in series has stacked
weights, as MGRIT has, so that all columns differentiate by the same tensors; what is compiled are 16 layers at a time.
A row whose turn comes after `-seconds` is left out, and said to be.

Physics-informed ones, on Burgers' equation: the gradient on the host, on the device with its two crossings, and the
error of that one, relative; the same kernels as one CUDA graph, without the crossings; and, where networks are small
enough for Levenberg-Marquardt, the Jacobian and J'J, which stay on the device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import nn_adapters as nna
from pdeopt.squares.gram import add_gram
from problems.shared.equations import EQUATIONS
from problems.shared.pinn_settings import MOST_UNKNOWNS

#: Layers that are compiled together: a loop over thousands would be unrolled for hours.
CHUNK = 16

Gradient = Callable[[], Tensor]


def chain(u: Tensor, W: Tensor, b: Tensor, dt: float) -> Tensor:
    """u_i = u_{i-1} + dt ReLU(W_i u_{i-1} + b_i) through all rows of W (layers, width, width) and b (layers, width)."""
    for weight, bias in zip(W.unbind(), b.unbind()):
        u = torch.add(u, torch.relu(torch.addmm(bias, u, weight.T)), alpha=dt)
    return u


def in_chunks(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The chain by a function of `CHUNK` layers."""

    def call(u: Tensor, W: Tensor, b: Tensor, dt: float) -> Tensor:
        for weights, biases in zip(W.split(CHUNK), b.split(CHUNK)):
            u = function(u, weights, biases, dt)
        return u

    return call


def gradient_of(forward: Callable[[], Tensor], parameters: list[Tensor]) -> Gradient:
    """The gradient of a loss by the first parameter; that by the others is computed, too."""
    return lambda: torch.autograd.grad(forward().square().mean(), parameters)[0]


def as_graph(gradient: Gradient) -> Gradient:
    """The same kernels as one CUDA graph, captured once and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # PyTorch asks for calls on another stream before a capture
        for _ in range(2):
            gradient()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradient()

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """The least time of a few calls, or of one where that takes more than two seconds."""
    found: list[float] = []
    call()
    while len(found) < 5 and sum(found) < 2000:
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        found.append(1e3 * (time.perf_counter() - begin))
    return min(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(layers: int, width: int, samples: int, device: torch.device, compiles: bool) -> str:
    """The columns of one network: milliseconds, and for MGRIT the error of the gradient, relative."""
    torch.manual_seed(0)
    words = {"serial": "never", "fused": "never"}
    network = nna.LayerParallel(None, lambda: nna.dense(width, "relu"), layers, 1.0, **words).to(device)
    x, (W, b), dt = torch.randn(samples, width, device=device), network.stacks, 1.0 / layers
    eager = gradient_of(lambda: chain(x, W, b, dt), [W, b])
    expected, columns = eager(), [f"{milliseconds(eager, device):9.1f}"]
    compiled = in_chunks(torch.compile(chain)) if compiles and layers % CHUNK == 0 else None
    columns.append(_column(compiled and gradient_of(lambda: compiled(x, W, b, dt), [W, b]), device))
    columns.append(_column(as_graph(eager) if device.type == "cuda" else None, device))
    for cycles, adjoint_cycles in ((0, 0), (1, 0), (1, 1)):
        (solver,) = network.solvers
        solver.forward.cycles, solver.adjoint.cycles = cycles, adjoint_cycles
        gradient = gradient_of(lambda: network(x), [W, b])
        error = float((gradient() - expected).norm() / expected.norm())
        columns.append(f"{milliseconds(gradient, device):9.1f} {error:.0e}")
        columns.append(_column(as_graph(gradient) if device.type == "cuda" else None, device))
    return f"{layers:6d} {width:5d} " + " ".join(columns)


def _column(call: Callable[[], object] | None, device: torch.device, digits: int = 1) -> str:
    return f"{'-':>9s}" if call is None else f"{milliseconds(call, device):9.{digits}f}"


def pinn_row(shape: str, points: int, device: torch.device) -> str:
    """The columns of one physics-informed network, as "4x20" for 4 layers of 20."""
    layers, width = map(int, shape.split("x"))
    words = {"body": "mlp", "adaptive": False, "features": "periodic"}
    host, pinn = (EQUATIONS["burgers"].function(points, layers, width, device=d, **words) for d in ("cpu", str(device)))
    theta = host.initial(0)
    expected, (raw, c) = host.value_and_gradient(theta)[1], pinn.split(theta)
    error = float((pinn.value_and_gradient(theta)[1] - expected).norm() / expected.norm())
    columns = [f"{milliseconds(lambda: host.value_and_gradient(theta)[1], torch.device('cpu')):9.2f}"]
    columns.append(f"{milliseconds(lambda: pinn.value_and_gradient(theta)[1], device):9.2f} {error:.0e}")
    span, inputs = (0, layers), [term.inputs for term in pinn.evaluated]
    there = partial(pinn.gradient_there, span, inputs, raw, c)
    columns.append(_column(as_graph(there) if device.type == "cuda" else None, device, 2))
    if pinn.size <= MOST_UNKNOWNS:
        J, gram = pinn.jacobian(theta), c.new_zeros(pinn.size, pinn.size)
        calls = partial(pinn.linearize, theta, out=J), partial(add_gram, gram, J)
        columns += [_column(call, device, 2) for call in calls]
    return f"{shape:>12s} " + " ".join(columns)


def pinn_table(shapes: list[str], points: int, device: torch.device) -> None:
    """Print the rows of these networks; the shortest part."""
    print(f"Burgers' equation at {points} points, double precision; ms")
    print("        PINN      host    device error     graph         J       J'J")
    for shape in shapes:
        print(pinn_row(shape, points, device), flush=True)


def main(argv: list[str] | None = None) -> None:
    """Print the table, or that there is no device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", default="cuda", help="where to compute (default %(default)s)")
    parser.add_argument("-layers", type=int, nargs="+", default=[1024, 4096, 16_384], help="depths")
    parser.add_argument("-widths", type=int, nargs="+", default=[8, 64, 256], help="widths")
    parser.add_argument("-samples", type=int, default=500, help="of a batch (default %(default)s)")
    pinns = ["4x20", "4x36", "8x64", "8x256"]
    parser.add_argument("-pinns", nargs="*", default=pinns, help="shapes of physics-informed networks")
    parser.add_argument("-points", type=int, default=10_000, help="of these (default %(default)s)")
    parser.add_argument("-seconds", type=float, default=270.0, help="after which no row begins (default %(default)s)")
    options = parser.parse_args(argv)
    device, begin = torch.device(options.device), time.perf_counter()
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench-gpu: no CUDA device that PyTorch can use; nothing was measured")
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose streams graphs are captured on
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    pinn_table(options.pinns, options.points, device)
    print(f"{name}, PyTorch {torch.__version__}, {options.samples} samples, single precision; ms of value and gradient")
    cycles = "".join(f"{which:>10s} error     graph" for which in ("0/0", "1/0", "1/1"))
    print(f"layers width     eager  compiled     graph{cycles}")
    for layers in options.layers:
        for width in options.widths:
            if time.perf_counter() - begin > options.seconds:
                print(f"{layers:6d} {width:5d}   left out: the time is over")
                continue
            try:
                print(row(layers, width, options.samples, device, device.type == "cuda"), flush=True)
            except torch.OutOfMemoryError:
                print(f"{layers:6d} {width:5d}   more memory than the device has", flush=True)


if __name__ == "__main__":
    main()
