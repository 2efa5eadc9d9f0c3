"""Weak forms in UFL against the same steps by scikit-fem and by hand in PyTorch: CPU seconds to the same optimum.

python -m problems.benchmarks.forms
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pdeopt as po
from problems.burgers import BurgersCase, BurgersSettings
from problems.heat import HeatCase, HeatSettings

#: Runs of each, of which the fastest counts.
REPEATS = 5


def heat_form() -> po.ControlProblem:
    from problems.benchmarks import weak_forms

    constraint, on = weak_forms.heat(60, 20)
    return problem(constraint, weak_forms.bump(on.points(constraint)), 1e-3, 64)


def burgers_form() -> po.ControlProblem:
    from problems.benchmarks import weak_forms

    constraint, on = weak_forms.burgers(128)
    return problem(constraint, constraint.coefficients(lambda x: 1.0 * (x[0] <= 0.5), on.u), 0.05, 256)


def problem(constraint: po.FormConstraint, target: object, alpha: float, nt: int) -> po.ControlProblem:
    objective = po.Tracking(target, constraint.state_mass) + po.ControlCost(alpha, constraint.control_mass)
    return po.ControlProblem(constraint, objective, po.TimeGrid.uniform(nt, 1.0))


#: What is solved: the weak form, and the same by hand.
CASES: dict[str, tuple[Callable[[], po.ControlProblem], Callable[[], po.ControlProblem]]] = {
    "heat 60x20, nt 64": (heat_form, lambda: HeatCase(HeatSettings(nx=60, ny=20, nt=64)).problem),
    "Burgers 128, nt 256": (burgers_form, lambda: BurgersCase(BurgersSettings(nx=128, nt=256)).problem),
}


def timed(make: Callable[[], po.ControlProblem]) -> tuple[float, float, float]:
    """CPU seconds of making the problem and of its solution, and the objective."""
    start = time.process_time()
    made = make()
    middle = time.process_time()
    objective = po.solve(made).objective
    return middle - start, time.process_time() - middle, objective


def main() -> None:
    """Print a line for each case: seconds of both, their ratio, the difference of the optimum."""
    for name, makers in CASES.items():
        runs = [[timed(make) for make in makers] for _ in range(REPEATS)]  # in turn: both meet the same load
        (set_up, solve), (set_up_by_hand, by_hand) = (
            (min(run[k][0] for run in runs), min(run[k][1] for run in runs)) for k in (0, 1)
        )
        form, other = runs[0][0][2], runs[0][1][2]
        print(f"{name}: weak form {set_up:.2f} + {solve:.2f} s, by hand {set_up_by_hand:.2f} + {by_hand:.2f} s")
        ratio = (set_up + solve) / (set_up_by_hand + by_hand)
        print(
            f"    ratio {ratio:.2f}, of the solution {solve / by_hand:.2f}; optimum {abs(form / other - 1):.0e} apart"
        )


if __name__ == "__main__":
    main()
