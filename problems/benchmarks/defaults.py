"""The default method against settings chosen by hand, on thirty control problems.

    python -m problems.benchmarks.defaults -json build/defaults.json
    python -m problems.benchmarks.defaults -only "heat 30x10, nt 512, alpha 1e-6" "minimum time"

Every case is a process: a small problem warms it up, and each setting is a fork of it, from zero control to optimality
1e-8. CPU seconds, the least of the repeats; a setting is stopped where it has taken more than the default.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from petsc4py import PETSc
from torch import Tensor

import pdeopt as po
from problems.benchmarks import kkt_hard
from problems.burgers import BurgersCase, BurgersSettings
from problems.heat import HeatCase, HeatSettings
from problems.klein_gordon import KleinGordonCase, KleinGordonSettings

#: How many times the best of the settings the default may take.
BAR = 1.3

#: CPU seconds that the default may take, and the others where it failed; seconds of repeats, and how many at most.
LIMIT, ENOUGH, REPEATS = 60.0, 0.6, 3

#: CPU seconds that do not count: a difference below is noise.
NOISE = 0.02


class Car(po.TimeDependentConstraint):
    """From rest to rest in the least time T = exp(p): x'' = z by the midpoint rule, in units of T."""

    state_dim, control_dim, param_dim = 2, 1, 1

    def initial_state(self, p: Tensor) -> Tensor:
        return torch.zeros(2, dtype=torch.float64)

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        dt = torch.exp(steps.p) * steps.dt[:, None]
        v = 0.5 * (u_old + u_new)[:, 1:]
        return u_new - u_old - dt * torch.cat([v, z], dim=1)


class Force(po.Objective):
    """weight / 2 times the integral of z^2 over (0, T)."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def value(self, u: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        return 0.5 * self.weight * torch.exp(steps.p) * steps.dt * z[:, 0] ** 2


def car(weight: float) -> po.ControlProblem:
    """Minimum time: 251 unknowns."""
    goal = torch.tensor([1.0, 0.0], dtype=torch.float64)
    arrival = po.TerminalLoss(lambda u, p: torch.exp(p).sum() + 0.5e4 * ((u - goal) ** 2).sum())
    return po.ControlProblem(Car(), Force(weight) + arrival, po.TimeGrid.uniform(50, T=1.0))


class VanDerPol(po.TimeDependentConstraint):
    """u'' = (1 - u^2) u' - u + z by implicit Euler."""

    state_dim, control_dim = 2, 1

    def initial_state(self, p: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0], dtype=torch.float64)

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        x, v = u_new[:, :1], u_new[:, 1:]
        return u_new - u_old - steps.dt[:, None] * torch.cat([v, (1 - x**2) * v - x + z], dim=1)


def van_der_pol(nt: int) -> po.ControlProblem:
    """An oscillator at rest: two states a step."""
    return po.ControlProblem(
        VanDerPol(), po.Tracking(np.zeros(2)) + po.ControlCost(0.1), po.TimeGrid.uniform(nt, T=10.0)
    )


def burgers(**settings: Any) -> po.ControlProblem:
    """Burgers' script."""
    return BurgersCase(BurgersSettings(**settings)).problem


def heat(**settings: Any) -> po.ControlProblem:
    """The script of heat."""
    return HeatCase(HeatSettings(**settings)).problem


def klein_gordon(**settings: Any) -> po.ControlProblem:
    """The script of Klein-Gordon."""
    return KleinGordonCase(KleinGordonSettings(**settings)).problem


@dataclass(frozen=True)
class Row:
    """A case: its problem, and bounds on its controls."""

    make: Callable[[], po.ControlProblem]
    bounds: dict[str, float] = field(default_factory=dict)


def _hard(name: str, nt: int, alpha: float) -> Row:
    return Row(lambda: kkt_hard.problem_of(name, nt, alpha), {"lower": -1.0, "upper": 1.0} if name == "bounds" else {})


#: The cases by name.
CASES: dict[str, Row] = {
    "Burgers 128, nt 32, alpha 1": Row(lambda: burgers(nt=32, alpha=1.0)),
    "Burgers 128, nt 256, alpha 0.05": Row(lambda: burgers()),
    "Burgers 128, nt 256, alpha 1e-3": Row(lambda: burgers(alpha=1e-3)),
    "Burgers 128, nt 128, alpha 1e-6": Row(lambda: burgers(nt=128, alpha=1e-6)),
    "Burgers 64, nt 1024, alpha 1e-8": Row(lambda: burgers(nx=64, nt=1024, alpha=1e-8)),
    "Burgers 64, nt 64, nu 1e-3": _hard("Burgers, nu 1e-3", 64, 0.05),
    "Burgers 64, nt 64, nu 1e-4": _hard("Burgers, nu 1e-4", 64, 0.05),
    "Burgers 64, nt 64, bounds": Row(lambda: burgers(nx=64, nt=64), {"lower": -1.0, "upper": 1.0}),
    "heat 60x20, nt 64, alpha 1e-3": Row(lambda: heat()),
    "heat 60x20, nt 256, alpha 1e-5": Row(lambda: heat(nt=256, alpha=1e-5)),
    "heat 30x10, nt 32, alpha 1": Row(lambda: heat(nx=30, ny=10, nt=32, alpha=1.0)),
    "heat 30x10, nt 512, alpha 1e-6": Row(lambda: heat(nx=30, ny=10, nt=512, alpha=1e-6)),
    "heat 30x10, nt 1024, alpha 1e-8": Row(lambda: heat(nx=30, ny=10, nt=1024, alpha=1e-8)),
    "heat 30x10, nt 64, bounds": Row(lambda: heat(nx=30, ny=10), {"lower": -1.0, "upper": 1.0}),
    "Klein-Gordon 64, nt 128, alpha 1e-2": Row(lambda: klein_gordon()),
    "Klein-Gordon 64, nt 128, alpha 1": Row(lambda: klein_gordon(alpha=1.0)),
    "Klein-Gordon 64, nt 512, alpha 1e-5": Row(lambda: klein_gordon(nt=512, alpha=1e-5)),
    "Klein-Gordon 16, nt 32, alpha 1e-8": Row(lambda: klein_gordon(nx=16, nt=32, alpha=1e-8)),
    "control on a subregion, alpha 1e-6": _hard("control on a subregion", 256, 1e-6),
    "boundary control, alpha 1e-6": _hard("boundary control", 256, 1e-6),
    "observation on a subregion, alpha 1e-3": _hard("observation on a subregion", 256, 1e-3),
    "observation at 9 points, alpha 1e-6": _hard("observation at 9 points", 256, 1e-6),
    "terminal loss, alpha 1e-3": _hard("terminal loss", 256, 1e-3),
    "advection, alpha 1e-6": _hard("advection", 256, 1e-6),
    "random steps, alpha 1e-3": _hard("random steps", 256, 1e-3),
    "two parameters, alpha 1e-3": _hard("two parameters", 64, 1e-3),
    "bounds, alpha 1e-5": _hard("bounds", 64, 1e-5),
    "penalty on states, alpha 1e-3": _hard("penalty on states", 64, 1e-3),
    "minimum time": Row(lambda: car(1.0)),
    "minimum time, bounds": Row(lambda: car(1e-3), {"lower": -1.0, "upper": 1.0}),
    "van der Pol, nt 2000": Row(lambda: van_der_pol(2000)),
}


def _sqp(**words: Any) -> dict[str, Any]:
    return {"method": "newton", **words}


#: Settings by name: arguments of `po.solve`, and options.
BY_HAND: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "newton direct": (_sqp(precond="direct"), {}),
    "newton wathen": (_sqp(precond="wathen"), {}),
    "wathen forward": (_sqp(precond="wathen"), {"wathen_propagator": "forward"}),
    "newton reduced": (_sqp(precond="reduced"), {}),
    "reduced, state": (_sqp(precond="reduced", start_state="state"), {}),
    "composite": ({"method": "sqp"}, {}),
    "tao nls": ({"method": "tao", "tao_type": "nls"}, {}),
}

#: The same where there are bounds.
BOUNDED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "sets direct": ({"method": "active_set", "precond": "direct"}, {}),
    "sets wathen": ({"method": "active_set", "precond": "wathen"}, {}),
    "sets, forward": ({"method": "active_set", "precond": "wathen"}, {"wathen_propagator": "forward"}),
    "sets reduced": ({"method": "active_set", "precond": "reduced"}, {}),
    "tao bqnls": ({"method": "tao", "tao_type": "bqnls"}, {}),
}


def run(row: Row, words: dict[str, Any], limit: float) -> dict[str, Any]:
    """The least CPU seconds of some solves, in this process."""
    given, times = dict(words), list[float]()
    begin = given.pop("start_state", None)
    if begin:
        PETSc.Options().setValue("sqp_start", begin)
    while not times or (sum(times) < ENOUGH and len(times) < REPEATS):
        problem = row.make()
        signal.setitimer(signal.ITIMER_PROF, limit)
        start = time.process_time()
        result = po.solve(problem, **given, **row.bounds)  # type: ignore[arg-type]
        times.append(time.process_time() - start)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    krylov = result.history.columns().get("krylov", [0])
    return {
        "converged": bool(result.converged),
        "cpu": min(times),
        "iterations": int(result.iterations),
        "krylov": int(sum(krylov)),
        "objective": float(result.objective),
        "why": result.message,
    }


def forked(row: Row, words: dict[str, Any], options: dict[str, str], limit: float) -> dict[str, Any]:
    """`run` in a fork of this process, ended where it takes more than the limit of CPU seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for name, value in options.items():
            PETSc.Options().setValue(name, value)
        try:
            found = run(row, words, limit)
        except Exception as error:  # whatever ends a setting is what was found of it
            found = {"converged": False, "why": f"{type(error).__name__}: {error}"}
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"converged": False, "why": f"stopped after {limit:.2f} CPU s"}


def measure(name: str) -> dict[str, Any]:
    """One case by all settings."""
    row = CASES[name]
    run(Row(lambda: burgers(nx=8, nt=8), row.bounds), {"method": "active_set" if row.bounds else "newton"}, LIMIT)
    found = {"default": forked(row, {}, {}, LIMIT)}
    limit = 1.1 * found["default"]["cpu"] + NOISE if found["default"]["converged"] else LIMIT
    for setting, (words, options) in (BOUNDED if row.bounds else BY_HAND).items():
        found[setting] = forked(row, words, options, limit)
    return {"case": name, "settings": found} | judged(found)


def judged(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The best setting, and how far the default is from it."""
    worked = {name: each["cpu"] for name, each in found.items() if each["converged"]}
    best = min(worked, key=lambda name: worked[name], default="none")
    if "default" not in worked:
        return {"best": best, "ratio": None if best == "none" else float("inf"), "met": best == "none"}
    ratio = worked["default"] / worked[best]
    return {"best": best, "ratio": ratio, "met": worked["default"] <= BAR * worked[best] + NOISE}


def line(row: dict[str, Any]) -> str:
    """A row of the table of the docs."""
    found, best = row["settings"]["default"], row["best"]
    own = f"{found['cpu']:.3g} ({found['iterations']}, {found['krylov']})" if found["converged"] else "fails"
    other = f"{row['settings'][best]['cpu']:.3g}, {best}" if best != "none" else "none works"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return f"| {row['case']} | {own} | {other} | {ratio} | {'met' if row['met'] else 'missed'} |"


def main() -> None:
    """Measure the cases of the command line."""
    parser = argparse.ArgumentParser(description="The default against the best setting.")
    parser.add_argument("-only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("-json", default="", help="write all rows to this file")
    parser.add_argument("-one", action="store_true", help="measure in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(1)
        print(json.dumps(measure(arguments.only[0])), flush=True)
        return
    rows = []
    for name in arguments.only:
        words = [sys.executable, "-m", "problems.benchmarks.defaults", "-one", "-only", name]
        rows.append(
            json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        )
        print(line(rows[-1]), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))
    print(f"{sum(row['met'] for row in rows)} of {len(rows)} within {BAR} of the best setting")


if __name__ == "__main__":
    main()
