"""Narrow dense layers on one core: one compiled loop through all of them, against cycles, PyTorch and a loop in C.

python -m problems.benchmarks.fused                      # 1024 and 4096 layers of width 8, 256 of 16, 32 and 64
python -m problems.benchmarks.fused -intervals           # cycles with and without the loop inside of intervals
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import nn_adapters as nna
from nn_adapters.layers.parts import fusedchain
from nn_adapters.layers.parts.fusedkernels import TILE

#: Layers, width, activation.
CASES = [
    *((layers, 8, act) for layers in (1024, 4096) for act in ("relu", "tanh")),
    *((256, width, "relu") for width in (16, 32, 64)),
]
SAMPLES, REPEATS = 500, 7

#: Of cycles, with the loop inside of intervals.
INSIDE = [
    (1024, 8, "relu"),
    (1024, 8, "tanh"),
    *((256, width, act) for width in (16, 32, 48, 64) for act in ("relu", "tanh")),
]

#: Settings of layer-parallel solves that are tried; the fastest counts.
RIVALS = [{"cycles": c, "adjoint_cycles": c, "coarsening": str(m)} for c in (0, 1) for m in (16, 32)] + [{"levels": 1}]


def milliseconds(call: Callable[..., object], *arguments: object) -> float:
    """The least CPU time of a few calls."""
    found = []
    for _ in range(REPEATS):
        begin = time.process_time()
        call(*arguments)
        found.append(1e3 * (time.process_time() - begin))
    return min(found)


def gradient(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of a loss, by the first parameter."""
    return torch.autograd.grad(network(x).square().mean(), list(network.parameters()))[0]


def network(layers: int, width: int, act: str, **words: object) -> nna.LayerParallel:
    """A network with weights that are always the same."""
    torch.manual_seed(0)
    return nna.LayerParallel(None, lambda: nna.dense(width, act), layers, 1.0, **words)


def in_c(layers: int, width: int, act: str) -> float | None:
    """Milliseconds of the C version; None without a compiler."""
    compiler, source = shutil.which("cc"), Path(__file__).with_name("fused_chain.c")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        object_file, library = f"{folder}/chain.o", f"{folder}/chain.so"
        flags = ["-O3", "-march=native", "-ffast-math", "-fPIC", f"-DWIDTH={width}", f"-DTILE={TILE}", "-DREAL=float"]
        flags.append(f"-DACT={('relu', 'tanh', 'silu').index(act)}")
        subprocess.run([compiler, *flags, "-c", str(source), "-o", object_file], check=True)
        # Linked without -ffast-math, which would make the whole process flush small numbers to zero.
        subprocess.run([compiler, "-shared", object_file, "-o", library, "-lmvec", "-lm"], check=True)
        chain = ctypes.CDLL(library)
    rng = np.random.default_rng(0)
    W = (rng.standard_normal((layers, width, width)) / width**0.5).astype("f")
    u, b = rng.standard_normal((width, SAMPLES)).astype("f"), np.zeros((layers, width), "f")
    dt = ctypes.c_float(1.0 / layers)

    def call() -> None:
        kept = np.empty((-(-SAMPLES // TILE), layers, width, TILE), "f")
        end, before, G, g = np.empty_like(u), np.empty_like(u), np.zeros_like(W), np.zeros_like(b)
        chain.forward(*_pointers(u, W, b), dt, layers, SAMPLES, *_pointers(kept, end))
        chain.backward(*_pointers(end, u, W), dt, layers, SAMPLES, *_pointers(kept, G, g, before))

    return milliseconds(call)


def _pointers(*arrays: np.ndarray) -> list[ctypes.c_void_p]:
    return [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]


def intervals() -> None:
    """Print what cycles cost with the loop inside of intervals and without it, on one rank, in turn."""
    fusedchain.RATIOS_INSIDE = dict.fromkeys(fusedchain.RATIOS_INSIDE, 0.9)  # so that it serves for all widths
    print(f"{SAMPLES} samples, single precision, CPU ms of value and gradient by cycles")
    print("layers width act   cycles  with  without  ratio  difference of gradients")
    for layers, width, act in INSIDE:
        x = torch.randn(SAMPLES, width, generator=torch.Generator().manual_seed(1))
        for cycles in ((1, 0), (1, 1)):
            words = {"cycles": cycles[0], "adjoint_cycles": cycles[1], "serial": "never"}
            pair = [network(layers, width, act, fused=fused, **words) for fused in ("intervals", "never")]
            a, b = (gradient(each, x) for each in pair)
            rounds = [[milliseconds(gradient, each, x) for each in pair] for _ in range(2)]
            own, other = np.min(rounds, axis=0)
            columns = f"{cycles[0]}/{cycles[1]} {own:8.1f} {other:8.1f} {own / other:6.2f}"
            print(f"{layers:6d} {width:4d} {act:5s}  {columns}   {float((a - b).norm() / b.norm()):.0e}", flush=True)


def main() -> None:
    """Print the table: milliseconds of CPU for values and gradients of a batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-intervals", action="store_true", help="cycles with and without the loop inside of intervals")
    fusedchain.LEAST_WORK = 1
    if parser.parse_args().intervals:
        intervals()
        return
    print(f"{SAMPLES} samples, single precision, CPU ms of value and gradient; error: of the gradient, relative")
    print("layers width act   chosen  error    C      best cycles or series      PyTorch")
    for layers, width, act in CASES:
        x, chosen = torch.randn(SAMPLES, width, generator=torch.Generator().manual_seed(1)), network(layers, width, act)
        serial = chosen.serial()
        expected = torch.autograd.grad(serial(x).square().mean(), serial.layers[0][0].weight)[0]
        error = float((gradient(chosen, x)[0] - expected).norm() / expected.norm())
        own, theirs = milliseconds(gradient, chosen, x), in_c(layers, width, act)
        rivals = [network(layers, width, act, fused="never", **words) for words in RIVALS]
        times = [milliseconds(gradient, rival, x) for rival in rivals]
        best = int(np.argmin(times))
        pytorch = milliseconds(gradient, serial, x)
        words = " ".join(f"{key} {value}" for key, value in RIVALS[best].items())
        columns = f"{own:7.1f}  {error:.0e} {theirs or np.nan:6.1f} {times[best]:7.1f} ({words}) {pytorch:7.1f}"
        print(f"{layers:6d} {width:4d} {act:5s} {columns}", flush=True)


if __name__ == "__main__":
    main()
