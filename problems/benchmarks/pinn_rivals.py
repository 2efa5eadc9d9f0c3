"""Physics-informed networks by the methods of others: SOAP, and Newton's method with Nystroem's preconditioner.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.pinn_rivals burgers soap -seconds 60 -seed 0

Network, features, factor, first weights and points are those of `problems.pinn_NAME -optimizer lm`. `soap` is that of
pytorch-optimizer (extra `rivals`), on W and b of the layers, with the settings of S. Wang, A. K. Bhartari, B. Li, P.
Perdikaris, arXiv:2502.00604, but a rate that falls to zero at the end of the run; points are drawn anew as for `lm`.
`nncg` is that of P. Rathore, W. Lei, Z. Frangella, L. Lu, M. Udell, ICML 2024, after L-BFGS for half of the time, both
on fixed points.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import nn_adapters as nna
import pdeopt as po
from problems.shared.equation import Equation
from problems.shared.equations import EQUATIONS
from problems.shared.pinn_settings import PinnSettings, chosen

#: Points of a step, and steps of SOAP on the same ones.
POINTS, STEPS = 2500, 50
#: Of the approximation of the Hessian, its age in steps, damping and steps of CG, as published.
RANK, AGE, DAMPING, CG_STEPS = 60, 20, 1e-2, 16

#: theta -> whether the time is spent; called after every step.
Watch = Callable[[Tensor], bool]


class Curve:
    """Errors over seconds of the processor, those of the measurements left out.

    Args:
        equation, function: whose error.
        seconds: of the run.
    """

    def __init__(self, equation: Equation, function: nna.PINN, seconds: float) -> None:
        self.equation, self.function, self.seconds = equation, function, seconds
        self.begin, self.next = time.process_time(), 0.0
        self.columns: dict[str, list[float]] = {"cpu_seconds": [], "relative_l2": []}

    @property
    def spent(self) -> float:
        """The part of the time that has gone."""
        return (time.process_time() - self.begin) / self.seconds

    def watch(self, theta: Tensor) -> bool:
        """Measure, where it is time; whether all of it is spent."""
        now = time.process_time()
        spent = now - self.begin
        if spent >= self.next or spent >= self.seconds:
            self.next = spent + 0.02 * self.seconds
            self.columns["cpu_seconds"].append(spent)
            self.columns["relative_l2"].append(self.equation.relative_error(self.function, theta))
            self.begin += time.process_time() - now
        return spent >= self.seconds


def soap(function: nna.PINN, theta: Tensor, curve: Curve, seed: int) -> None:
    """SOAP with points drawn anew every `STEPS` steps."""
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        raise po.InputError("soap", "no module pytorch_optimizer", "pip install 'pdeopt[rivals]'") from None

    layers = function.network.layers(theta.clone())
    parameters = [torch.nn.Parameter(each.clone()) for layer in layers for each in (layer.W, layer.b)]
    optimizer = SOAP(parameters, lr=3e-3, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=2)
    step = 0
    while not curve.watch(theta):
        if step % STEPS == 0:
            rows = function.sample(theta, POINTS, seed + 1000 * step)
        optimizer.param_groups[0]["lr"] = 3e-3 * 0.5 * (1.0 + math.cos(math.pi * min(curve.spent, 1.0)))
        g = rows.value_and_gradient(theta)[1]
        for parameter, part in zip(parameters, g.split([each.numel() for each in parameters])):
            parameter.grad = part.view_as(parameter).clone()
        optimizer.step()
        theta, step = torch.cat([each.detach().flatten() for each in parameters]), step + 1


def nncg(function: nna.PINN, theta: Tensor, curve: Curve, seed: int) -> None:
    """L-BFGS for half of the time, then Newton's method: CG with Nystroem's preconditioner, and Armijo's rule."""
    f = function.sample(theta, POINTS, seed)
    stop = po.LBFGS(f, memory=100, max_it=10**9, max_gradients=0)
    theta = stop.minimize(theta, until=lambda m: curve.watch(m.x) or curve.spent > 0.5).design
    step = 0
    while not curve.watch(theta):
        value, g = f.value_and_gradient(theta)
        if step % AGE == 0:
            U, s = _nystroem(lambda d, x=theta: f.hvp(x, d), f.size, seed + step)
        d = _cg(lambda p, x=theta: f.hvp(x, p) + DAMPING * p, -g, U, s, min(math.sqrt(float(g.norm())), 1e-3))
        length, slope = 1.0, float(g @ d)
        while f.value(theta + length * d) > value + 0.1 * length * slope and length > 1e-10:
            length *= 0.5
        theta, step = theta + length * d, step + 1


def _nystroem(product: Callable[[Tensor], Tensor], size: int, seed: int) -> tuple[Tensor, Tensor]:
    """U, s with H about U s U': of random directions, (size, `RANK`), negative parts left out."""
    random = torch.randn(size, RANK, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q = torch.linalg.qr(random)[0]
    Y = torch.stack([product(q) for q in Q.T], 1)
    shift = float(torch.finfo(Y.dtype).eps * Y.norm()) + max(0.0, -2.0 * float(torch.linalg.eigvalsh(Q.T @ Y)[0]))
    factor = torch.linalg.cholesky(0.5 * (Q.T @ Y + Y.T @ Q) + shift * torch.eye(RANK, dtype=Y.dtype))
    U, root, _ = torch.linalg.svd(torch.linalg.solve_triangular(factor, (Y + shift * Q).T, upper=False).T, False)
    return U, (root.square() - shift).clamp(min=0.0)


def _cg(product: Callable[[Tensor], Tensor], b: Tensor, U: Tensor, s: Tensor, rtol: float) -> Tensor:
    """Of the damped system, to a residual, by at most `CG_STEPS` steps; negative curvature ends it."""

    def preconditioned(r: Tensor) -> Tensor:
        c = U.T @ r
        return U @ ((float(s[-1]) + DAMPING) / (s + DAMPING) * c - c) + r

    x, r = torch.zeros_like(b), b.clone()
    z = preconditioned(r)
    p, rho, end = z.clone(), float(r @ z), rtol * float(b.norm())
    for _ in range(CG_STEPS):
        Hp = product(p)
        curvature = float(p @ Hp)
        if curvature <= 0.0:
            break
        x, r = x + rho / curvature * p, r - rho / curvature * Hp
        if float(r.norm()) <= end:
            break
        z = preconditioned(r)
        rho, before = float(r @ z), rho
        p = z + rho / before * p
    return x if bool(x.any()) else b


METHODS = {"soap": soap, "nncg": nncg}


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """The curve of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=EQUATIONS)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("-seconds", type=float, default=60.0, help="of the processor")
    parser.add_argument("-seed", type=int, default=0, help="of weights and points")
    parser.add_argument("-json", default="", help="write the curve to this file")
    options = parser.parse_args(argv)
    equation = EQUATIONS[options.problem]
    s = chosen(equation, PinnSettings(optimizer="lm"))
    words = {"body": "mlp", "activation": s.activation, "adaptive": False, "features": s.features}
    function = equation.function(10_000, s.layers, s.width, **words)
    curve = Curve(equation, function, options.seconds)
    METHODS[options.method](function, function.initial(options.seed), curve, options.seed)
    found = list(zip(*curve.columns.values()))
    print(
        f"{options.problem} {options.method}:", ", ".join(f"{e:.1e} at {t:.0f} s" for t, e in found[:: len(found) // 6])
    )
    if options.json:
        Path(options.json).write_text(json.dumps(curve.columns))
    return curve.columns


if __name__ == "__main__":
    main()
