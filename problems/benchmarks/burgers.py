"""Burgers and heat control: CPU seconds to optimality 1e-8 and peak memory against what a user would do otherwise.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.burgers -json build/burgers_benchmark.json

Every (solver, case) runs in a process of its own on one thread: a small warm-up solve, then the median of the
repetitions, set-up of the problem included, imports not, then its peak memory. All processes run one after the other,
so ratios are of one run. A solver that does not end at the tolerance says so in its row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from importlib.util import find_spec
from typing import Any

from problems.benchmarks.processes import Row, bar, measure, median_seconds, peak_mb, plain, run, show

WORK = "problems.benchmarks.burgers"

#: What `po.solve` is given, by name of the row.
OURS: dict[str, dict[str, Any]] = {
    "pdeopt default": {},
    "pdeopt Newton, wathen": {"method": "newton", "precond": "wathen"},
    "pdeopt Newton, reduced": {"method": "newton", "precond": "reduced"},
    "pdeopt composite step": {"method": "sqp"},
    "pdeopt TAO lmvm": {"method": "tao", "tao_type": "lmvm"},
    "pdeopt TAO nls": {"method": "tao", "tao_type": "nls"},
}

#: Those whose best is judged where a bar asks for "pdeopt".
CHOICES = tuple(name for name in OURS if "TAO" not in name)

#: Solvers of `rivals`, and the packages that they need.
THEIRS = {
    "burgers": {
        "SciPy L-BFGS-B": "",
        "SciPy L-BFGS-B, tuned": "",
        "SciPy trust-ncg": "",
        "PyROL": "pyrol",
        "CasADi + IPOPT": "casadi",
    },
    "heat": {"SciPy CG": "", "PyROL": "pyrol"},
}

TOLERANCE = 1e-8

#: CPU seconds after which a solve is not repeated.
ENOUGH = 10.0

#: How much faster pdeopt should be than rivals of the same kind, and than others by nx = nt.
CLOSE = {"PyROL": 1.3, "SciPy trust-ncg": 1.3}
LIMITS = {
    128: CLOSE | {"SciPy L-BFGS-B": 5, "SciPy L-BFGS-B, tuned": 2, "CasADi + IPOPT": 5},
    256: CLOSE | {"SciPy L-BFGS-B": 4},
}

Found = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A problem and its sizes; heat has a third as many elements in y as in x."""

    problem: str
    nx: int
    nt: int
    alpha: float = 0.05
    nu: float = 0.01

    def __str__(self) -> str:
        words = f"{self.problem} nx {self.nx}, nt {self.nt}, alpha {self.alpha:g}"
        return words if self.problem == "heat" else f"{words}, nu {self.nu:g}"


class Benchmark:
    """The groups of rows.

    Args:
        sizes: nx = nt of the comparison.
        repeat: repetitions, of which the median counts.
    """

    def __init__(self, sizes: Sequence[int], repeat: int) -> None:
        self.sizes, self.repeat = sizes, repeat

    def comparison(self) -> list[Row]:
        """Burgers at alpha 0.05."""
        rows = []
        for n in self.sizes:
            found, more = self._all(Case("burgers", n, n))
            rows += [*more, *judged(found, f"Burgers {n}", LIMITS.get(n, {}))]
            if n == 128:
                rows += methods_of_tao(found)
        return rows

    def cheap_control(self) -> list[Row]:
        """Burgers 128 at alpha 1e-3."""
        found, rows = self._all(Case("burgers", 128, 128, 1e-3))
        return [*rows, *judged(found, "Burgers 128, alpha 1e-3", CLOSE | {"SciPy L-BFGS-B": 12})]

    def viscosity(self) -> list[Row]:
        """Burgers 64 at low viscosities: the default against the fastest rival that ends at the tolerance."""
        rows = []
        for nu in (1e-3, 1e-4):
            found, more = self._all(Case("burgers", 64, 64, nu=nu))
            rows += more
            good = [each["cpu"] for name, each in found.items() if name in THEIRS["burgers"] and not each["failed"]]
            default = found["pdeopt default"]
            case = f"Burgers 64, nu {nu:g}: pdeopt default / the fastest rival"
            if default["failed"] or not good:
                rows.append(show(Row(case, None, "x", "<= 2", False)))
            else:
                rows.append(bar(case, default["cpu"] / min(good), "x", 2))
        return rows

    def heat(self) -> list[Row]:
        """Heat, 60 x 20 elements."""
        rows = []
        for nt in (64, 256):
            for alpha in (1e-3, 1e-5):
                found, more = self._all(Case("heat", 60, nt, alpha))
                both = {"SciPy CG": 2 if alpha == 1e-3 else 5, "PyROL": 5}
                rows += [*more, *judged(found, f"heat 60x20, nt {nt}, alpha {alpha:g}", both if nt == 256 else {})]
                if (nt, alpha) == (64, 1e-3):
                    rows.append(
                        bar("heat 60x20, nt 64, composite step", found["pdeopt composite step"]["cpu"], "CPU s", 4)
                    )
        return rows

    def growth(self) -> list[Row]:
        """Cost per unknown of the default at nx = 64 as the number of steps grows."""
        steps = (256, 1024, 4096, 16_384)
        cost = {}
        for nt in steps:
            found = self._one("pdeopt default", Case("burgers", 64, nt))
            cost[nt] = 1e6 * found["cpu"] / (nt * (63 + 65 + 63))
        rows = [plain(f"default, Burgers nx 64, nt {nt}", cost[nt], "us per unknown") for nt in steps]
        return [*rows, bar("cost per unknown, nt 16,384 against 256", cost[steps[-1]] / cost[256], "x", 1.2)]

    def sweep(self) -> list[Row]:
        """One batched residual and Jacobian-vector product over 4096 steps against a loop over the steps."""
        found = run(WORK, "-worker", "sweep", "burgers", 64, 4096, 0.05, 0.01, self.repeat)
        words = "residual and Jacobian-vector product, 4096 steps: loop / batched"
        return [bar(words, found["ratio"], "x", 20, at_most=False)]

    def _one(self, solver: str, case: Case) -> dict[str, Any]:
        found: dict[str, Any] = run(WORK, "-worker", solver, *astuple(case), self.repeat)
        return found

    def _all(self, case: Case) -> tuple[Found, list[Row]]:
        """Every solver of a case, and a row of time and one of memory for each."""
        found, rows = {}, []
        theirs = (name for name, package in THEIRS[case.problem].items() if not package or find_spec(package))
        ours = CHOICES if case.problem == "heat" else tuple(OURS)
        for name in (*ours, *theirs):
            one = found[name] = self._one(name, case)
            note = "{iterations} its, J {objective:.10g}, optimality {optimality:.0e}".format(**one)
            said = f"{name}; {case} ({one['failed'] or note})"
            rows.append(show(Row(said, one["cpu"], "CPU s", "", False if one["failed"] else None)))
            rows.append(plain(f"{name}; {case}", one["peak_mb"], "MB peak"))
        return found, rows


def judged(found: Found, case: str, limits: dict[str, float]) -> list[Row]:
    """How much faster than rivals the default is, and how much the best of our choices."""
    rows = []
    best = min((found[name]["cpu"], name) for name in CHOICES if not found[name]["failed"])
    for rival, limit in limits.items():
        if rival not in found or found[rival]["failed"]:
            continue
        for seconds, name in {(found["pdeopt default"]["cpu"], "pdeopt default"), best}:
            rows.append(bar(f"{case}: {rival} / {name}", found[rival]["cpu"] / seconds, "x", limit, at_most=False))
    rows.append(bar(f"{case}: default / best ({best[1]})", found["pdeopt default"]["cpu"] / best[0], "x", 1.3))
    return rows


def methods_of_tao(found: Found) -> list[Row]:
    """TAO's methods at Burgers 128."""
    lmvm = found["pdeopt TAO lmvm"]["cpu"] / found["SciPy L-BFGS-B"]["cpu"]
    return [
        bar("Burgers 128: TAO lmvm / SciPy L-BFGS-B", lmvm, "x", 1),
        bar("Burgers 128: TAO nls", found["pdeopt TAO nls"]["cpu"], "CPU s", 0.6),
    ]


def work(solver: str, problem: str, nx: int, nt: int, alpha: float, nu: float, repeat: int) -> dict[str, Any]:
    """Run one solver in this process; median CPU seconds, its result, and the peak memory."""
    if solver == "sweep":
        return {"ratio": sweep_ratio(nx, nt, repeat)}
    solve = our_solver(solver) if solver in OURS else rival(solver)
    solve(Case(problem, 8, 8, alpha))  # imports and first-call costs of the libraries
    results: list[dict[str, Any]] = []
    while len(results) < repeat and sum(result["cpu"] for result in results) < ENOUGH:
        begin = time.process_time()
        try:
            found = solve(Case(problem, nx, nt, alpha, nu))
        except RuntimeError as failure:
            found = {"failed": str(failure), "iterations": 0, "objective": 0.0, "optimality": 0.0}
        results.append({"failed": "", **found, "cpu": time.process_time() - begin})
        if results[-1]["failed"]:
            break
    cpu = statistics.median(result["cpu"] for result in results)
    return {**results[-1], "cpu": cpu, "peak_mb": peak_mb()}


def our_solver(name: str) -> Callable[[Case], dict[str, Any]]:
    """Problem set-up and solve by pdeopt."""
    import pdeopt as po
    from problems.burgers import BurgersCase, BurgersSettings
    from problems.heat import HeatCase, HeatSettings

    def solve(case: Case) -> dict[str, Any]:
        if case.problem == "heat":
            sizes = {"nx": case.nx, "ny": max(2, case.nx // 3), "nt": case.nt}
            problem = HeatCase(HeatSettings(alpha=case.alpha, **sizes)).problem
        else:
            problem = BurgersCase(BurgersSettings(nx=case.nx, nt=case.nt, alpha=case.alpha, nu=case.nu)).problem
        words: dict[str, Any] = {"opt_tol": TOLERANCE, **OURS[name]}
        result = po.solve(problem, **words)
        return {
            "failed": "" if result.converged else result.message,
            "iterations": result.iterations,
            "optimality": result.history[-1].optimality,
            "objective": result.objective,
        }

    return solve


def rival(name: str) -> Callable[[Case], dict[str, Any]]:
    """A solver of `rivals`."""
    from problems.benchmarks.rivals import BURGERS, HEAT

    def solve(case: Case) -> dict[str, Any]:
        if case.problem == "heat":
            found = HEAT[name](case.nx, case.nt, TOLERANCE, alpha=case.alpha)
        else:
            found = BURGERS[name](case.nx, case.nt, TOLERANCE, alpha=case.alpha, nu=case.nu)
        stopped = "" if found.optimality <= 2 * TOLERANCE else f"stopped at {found.optimality:.0e}"
        return {
            "failed": stopped,
            "iterations": found.iterations,
            "optimality": found.optimality,
            "objective": found.objective,
        }

    return solve


def sweep_ratio(nx: int, nt: int, repeat: int) -> float:
    """Seconds of a Python loop over the steps / seconds of one batched call; same numbers."""
    import torch

    from pdeopt.core.autodiff import jvp
    from problems.burgers import BurgersCase, BurgersSettings

    case = BurgersCase(BurgersSettings(nx=nx, nt=nt))
    constraint, steps = case.problem.constraint, case.problem.grid.steps
    point = tuple(torch.randn(nt, k, dtype=torch.float64) for k in (nx - 1, nx - 1, nx + 1))
    direction = tuple(torch.randn_like(x) for x in point)

    def product(rows: slice) -> Any:
        def residual(*x: Any) -> Any:
            return constraint.residual(*x, steps[rows])

        return jvp(residual, tuple(x[rows] for x in point), tuple(d[rows] for d in direction))

    def loop() -> Any:
        return torch.cat([product(slice(i, i + 1)) for i in range(nt)])

    def batched() -> Any:
        return product(slice(0, nt))

    assert torch.allclose(loop(), batched())
    clock = time.process_time
    return median_seconds(loop, repeat, clock) / median_seconds(batched, 5 * repeat, clock)


CASES: dict[str, Callable[[Benchmark], list[Row]]] = {
    name: getattr(Benchmark, name) for name in ("comparison", "cheap_control", "viscosity", "heat", "growth", "sweep")
}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these groups alone")
    parser.add_argument("-sizes", type=int, nargs="+", default=(32, 64, 128, 256), help="nx = nt of the comparison")
    parser.add_argument("-repeat", type=int, default=3, help="repetitions, of which the median counts")
    parser.add_argument("-worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        solver, problem, nx, nt, alpha, nu, repeat = options.worker
        print(json.dumps(work(solver, problem, int(nx), int(nt), float(alpha), float(nu), int(repeat))))
        return []
    return measure(CASES, options.only, Benchmark(options.sizes, options.repeat), options.json)


if __name__ == "__main__":
    main()
