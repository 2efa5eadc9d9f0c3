"""Many steps: several ranks against one and against the best serial solvers, and time per unknown.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.many_steps -json build/many_steps.json

Newton's method from zero control to optimality 1e-8, set-up of the problem included. Seconds are CPU seconds of the
rank that needs most, in which a rank that waits counts as long as it asks for messages: on a machine with as many cores
as ranks, and nothing else to do, they are those of the clock.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from problems.benchmarks.kkt import WORK, spread
from problems.benchmarks.processes import Row, bar, measure, plain, run

#: Problems for several ranks, and smaller ones.
SIZES = {
    "heat 60x20, nt 1024": ["heat", "-nx", 60, "-ny", 20, "-nt", 1024],
    "Burgers nx 256, nt 2048": ["burgers", "-nx", 256, "-nt", 2048],
}
QUICK = {"heat 15x5, nt 64": ["heat", "-nx", 15, "-ny", 5, "-nt", 64]}

#: Ways that are parallel in time, and the same without.
PARALLEL = {
    "matched": ["-sqp_kkt_precond", "wathen", "-wathen_propagator", "mgrit"],
    "reduced": ["-sqp_kkt_precond", "reduced", "-propagator", "mgrit"],
}
SERIAL = {
    "matched": ["-sqp_kkt_precond", "wathen", "-wathen_propagator", "forward"],
    "reduced": ["-sqp_kkt_precond", "reduced", "-propagator", "serial"],
}

#: Ways whose time per unknown is measured: that of the library's choice, and both serial ones.
CHOICES = {"auto": ["-sqp_kkt_precond", "auto"]} | SERIAL


class Benchmark:
    """The cases.

    Args:
        quick: small sizes, to see that all runs.
        repeat: repetitions, of which the median counts.
        ranks: how many, 1 first.
    """

    def __init__(self, quick: bool = False, repeat: int = 3, ranks: Sequence[int] = (1, 2, 4)) -> None:
        self.quick, self.repeat, self.numbers = quick, repeat, ranks

    def newton(self, *words: object, ranks: int = 1) -> dict[str, Any]:
        """What an optimization took."""
        found: dict[str, Any] = run(WORK, "sqp", *words, "-sqp_type", "newton", "-repeat", self.repeat, ranks=ranks)
        return found

    def ranks(self) -> list[Row]:
        """The same propagator on several ranks, and substitution on one."""
        rows = []
        for case, words in (QUICK if self.quick else SIZES).items():
            serial = {way: self.newton(*words, *own) for way, own in SERIAL.items()}
            for way, one in serial.items():
                rows.append(plain(f"{case}, {way}, substitution ({spent(one)})", one["cpu"], "CPU s"))
            best = min(one["cpu"] for one in serial.values())
            for way, own in PARALLEL.items():
                found = {ranks: self.newton(*words, *own, ranks=ranks) for ranks in self.numbers}
                for ranks, one in found.items():
                    rows.append(plain(f"{case}, {way}, MGRIT, {ranks} ranks ({spent(one)})", one["cpu"], "CPU s"))
                gain = found[1]["cpu"] / found[2]["cpu"]
                rows += [
                    bar(f"{case}, {way}: two ranks against one, same propagator", gain, "x", 1.6, at_most=False),
                    plain(f"{case}, {way}: two ranks against the best serial solver", best / found[2]["cpu"], "x"),
                    bar(
                        f"{case}, {way}: change of iterations", spread([one["krylov"] for one in found.values()]), "", 1
                    ),
                ]
        return rows

    def unknowns(self) -> list[Row]:
        """Time per unknown against steps: Burgers, 64 elements."""
        rows, steps = [], (32, 64) if self.quick else (256, 1024, 4096, 16_384)
        for way, own in CHOICES.items():
            cost = []
            for nt in steps:
                one = self.newton("burgers", "-nx", 64, "-nt", nt, *own)
                cost.append(1e6 * one["cpu"] / one["unknowns"])
                rows.append(plain(f"Burgers nx 64, nt {nt}, {way} ({spent(one)})", cost[-1], "us per unknown"))
            case = f"Burgers nx 64, {way}: time per unknown, nt {steps[-1]} / {steps[0]}"
            rows.append(bar(case, cost[-1] / cost[0], "x", 1.2))
        return rows


def spent(one: dict[str, Any]) -> str:
    """In words."""
    return "{iterations} its, {krylov} Krylov".format(**one)


CASES: dict[str, Callable[[Benchmark], list[Row]]] = {"ranks": Benchmark.ranks, "unknowns": Benchmark.unknowns}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("-repeat", type=int, default=3, help="repetitions of timings, of which the median counts")
    parser.add_argument("-ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks, 1 and 2 among them")
    parser.add_argument("-quick", action="store_true", help="small sizes: does it run?")
    options = parser.parse_args(argv)
    return measure(CASES, options.only, Benchmark(options.quick, options.repeat, options.ranks), options.json)


if __name__ == "__main__":
    main()
