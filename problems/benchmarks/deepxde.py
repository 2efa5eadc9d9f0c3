"""Burgers' equation by a network, against DeepXDE with the settings of its own example, each in a process of its own.

The example (3 layers of 20, 2540 points inside, 80 on the sides, 160 at the start, 15,000 steps of Adam, then L-BFGS)
is run with the PyTorch backend in single precision, as it comes, and in double precision. pdeopt then trains until its
error is lower. DeepXDE is no part of pdeopt's installation:

    pip install --target /tmp/deepxde deepxde scikit-optimize
    python -m problems.benchmarks.deepxde -path /tmp/deepxde -json deepxde.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from problems.benchmarks.layer_parallel import script
from problems.benchmarks.processes import Row, bar, measure, plain, run, show

THIS = "problems.benchmarks.deepxde"
OWN = ("-layers", 4, "-body", "mlp", "-adaptive", "false", "-error_every", 10)


class Benchmark:
    """DeepXDE and pdeopt on one equation.

    Args:
        path: folder of DeepXDE, where it is not installed.
        steps: of Adam.
    """

    def __init__(self, path: str, steps: int) -> None:
        self.path, self.steps = path, steps

    def burgers(self) -> list[Row]:
        """Error and processor time of both."""
        if self.path:
            sys.path.append(self.path)
        if find_spec("deepxde") is None:
            return [show(Row("DeepXDE is not installed: left out, see -path", None, ""))]
        rows = []
        for precision in ("float32", "float64"):
            theirs = run(THIS, "-rival", precision, "-path", self.path, "-steps", self.steps)
            rows.append(
                plain(f"DeepXDE, {precision}, after {theirs['seconds']:.0f} CPU s", theirs["error"], "relative L2")
            )
            ours = script("pinn_burgers", *OWN, "-target_error", theirs["error"])
            error, seconds = ours["relative_l2"], ours["cpu_seconds"]
            rows.append(bar(f"pdeopt, after {seconds:.1f} CPU s", error, "relative L2", theirs["error"]))
            ratio = seconds / theirs["seconds"]
            rows.append(bar(f"CPU time to the error of DeepXDE, {precision}: pdeopt / DeepXDE", ratio, "x", 1.0))
        return rows


def rival(precision: str, steps: int) -> dict[str, float]:
    """DeepXDE's example: its error and the processor time that its training took."""
    os.environ["DDE_BACKEND"] = "pytorch"
    import deepxde as dde
    import numpy as np
    import torch

    from problems.shared.equations import EQUATIONS, VISCOSITY

    dde.config.set_default_float(precision)
    dde.config.set_random_seed(0)
    domain = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 0.99))

    def equation(x: Any, u: Any) -> Any:
        u_x, u_t = (dde.grad.jacobian(u, x, i=0, j=j) for j in (0, 1))
        return u_t + u * u_x - VISCOSITY * dde.grad.hessian(u, x, i=0, j=0)

    sides = dde.icbc.DirichletBC(domain, lambda x: 0, lambda _, on: on)
    start = dde.icbc.IC(domain, lambda x: -np.sin(np.pi * x[:, 0:1]), lambda _, on: on)
    data = dde.data.TimePDE(domain, equation, [sides, start], num_domain=2540, num_boundary=80, num_initial=160)
    model = dde.Model(data, dde.nn.FNN([2, 20, 20, 20, 1], "tanh", "Glorot normal"))
    begin = time.process_time()
    model.compile("adam", lr=1e-3)
    model.train(iterations=steps)
    model.compile("L-BFGS")
    model.train()
    seconds = time.process_time() - begin
    case = EQUATIONS["burgers"]
    x = case.grid()
    exact = case.solution(x)
    found = torch.from_numpy(model.predict(x.numpy().astype(precision))[:, 0]).double()
    return {"error": float((found - exact).norm() / exact.norm()), "seconds": seconds}


CASES: dict[str, Callable[[Benchmark], list[Row]]] = {"burgers": Benchmark.burgers}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("-path", default="", help="folder of DeepXDE, where it is not installed")
    parser.add_argument("-steps", type=int, default=15_000, help="of Adam")
    parser.add_argument("-rival", choices=("float32", "float64"), help="run DeepXDE alone, and print a line of JSON")
    options: Any = parser.parse_args(argv)
    if options.path:
        sys.path.append(options.path)
    if options.rival:
        print(json.dumps(rival(options.rival, options.steps)))
        return []
    return measure(CASES, options.only, Benchmark(options.path, options.steps), options.json)


if __name__ == "__main__":
    main()
