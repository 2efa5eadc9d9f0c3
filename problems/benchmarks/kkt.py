"""KKT systems: iterations, time and memory of the solvers in time, against bars and against serial solvers.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.kkt -json build/kkt_benchmark.json

Systems are those of the first Newton step from zero, and the same with a random multiplier residual, solved by
flexible GMRES to a relative residual of 1e-8. Every measurement runs in a process of its own on one thread, or
one a rank, one after the other, so that ratios are of one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from problems.benchmarks.kkt_hard import NAMES
from problems.benchmarks.processes import Row, bar, measure, memory_mb, plain, run, show, table

WORK, HARD = "problems.benchmarks.kkt_work", "problems.benchmarks.kkt_hard"

#: Seconds of the fastest code known for Burgers 160 x 160, a reduced-space method in C++.
FASTEST = 0.30
#: Iterations that the tables of variants allow.
CAP = 100
FIXED = [f"-sqp_{name}_rtol" for name in ("multiplier", "normal", "projection", "tangential")]
SERIAL = ["-wathen_schur", "matched", "-wathen_propagator", "forward", "-sqp_kkt_wathen_ksp_type", "preonly"]
#: The least memory: CG on the Schur complement all the way, not flexible Krylov methods, which keep their vectors.
FRUGAL = [
    word
    for name, value in {"type": "cg", "norm_type": "natural", "rtol": 1e-8, "max_it": 60}.items()
    for word in (f"-sqp_kkt_wathen_ksp_{name}", value)
]
#: Variants of the published kind, by their options.
VARIANTS: dict[str, list[str]] = {
    "new_state": ["-wathen_schur", "new_state"],
    "old_new": ["-wathen_schur", "old_new"],
    "matched": ["-wathen_schur", "matched", "-sqp_kkt_wathen_ksp_type", "preonly"],
    "matched, serial": SERIAL,
    "matched, four steps": [],
    "matched, Schur multigrid": ["-wathen_propagator", "multigrid"],
    "block Jacobi": ["-sqp_kkt_precond", "block_jacobi"],
    "multigrid": ["-sqp_kkt_precond", "multigrid"],
}


class Benchmark:
    """The cases; their sizes shrink with `-quick`.

    Args:
        quick: small sizes, to see that all runs.
        repeat: repetitions of timings, of which the median counts.
    """

    def __init__(self, quick: bool = False, repeat: int = 3) -> None:
        self.quick, self.repeat = quick, repeat
        self.steps = (16, 32, 64) if quick else (64, 256, 1024, 4096)
        self.mesh = ["-nx", 15, "-ny", 5] if quick else ["-nx", 60, "-ny", 20]
        self.middle = 64 if quick else 256  # steps where only one number is asked for

    def heat(self, *words: object, ranks: int = 1, task: str = "kkt") -> dict[str, Any]:
        """A heat system on the mesh, unless the words say otherwise."""
        return run(WORK, task, "heat", *self.mesh, *words, ranks=ranks)

    def heat_steps(self) -> list[Row]:
        """Iterations against steps and regularization."""
        rows, counts = [], {}
        for alpha in (1, 1e-2, 1e-4, 1e-6, 1e-8):
            for nt in self.steps:
                found = self.heat("-nt", nt, "-alpha", alpha)
                counts[alpha, nt] = worst(found)
                rows.append(bar(f"heat, alpha {alpha:g}, nt {nt} ({note(found)})", counts[alpha, nt], "iterations", 12))
            of_alpha = [counts[alpha, nt] for nt in self.steps]
            rows.append(bar(f"heat, alpha {alpha:g}, growth over nt", spread(of_alpha), "iterations", 3))
        return [*rows, plain("heat, spread over the whole table", spread(list(counts.values())), "iterations")]

    def windows(self) -> list[Row]:
        """Iterations against windows and ranks."""
        rows, counts, nt = [], [], self.middle
        for ranks in (1, 2) if self.quick else (1, 2, 4):
            for number in (1, 4, 16) if self.quick else (1, 2, 4, 8, 16, 32, 64):
                found = self.heat("-nt", nt, "-mgrit_window", nt // number, ranks=ranks)
                counts.append(worst(found))
                case = f"heat, nt {nt}, {number} windows, {ranks} ranks ({note(found)})"
                rows.append(plain(case, counts[-1], "iterations"))
        return [*rows, bar("heat, change over windows and ranks", spread(counts), "iterations", 1)]

    def meshes(self) -> list[Row]:
        """Iterations against the mesh."""
        rows, counts = [], []
        for nx in (15, 30) if self.quick else (15, 30, 60, 120):
            found = self.heat("-nx", nx, "-ny", nx // 3, "-nt", 64)
            counts.append(worst(found))
            rows.append(plain(f"heat, mesh {nx} x {nx // 3}, nt 64 ({note(found)})", counts[-1], "iterations"))
        return [*rows, bar("heat, change over meshes", spread(counts), "iterations", 3)]

    def burgers_steps(self) -> list[Row]:
        """The whole optimization against steps: iterations, and time per unknown."""
        rows, found = [], {}
        for nt in (32, 64) if self.quick else (32, 64, 128, 256, 512, 1024, 2048, 4096):
            one = found[nt] = sqp("-nt", nt, repeat=self.repeat)
            one["cost"] = 1e6 * one["seconds"] / one["unknowns"]
            case = f"Burgers SQP, nx 64, nt {nt}"
            spent = "{iterations} its, {krylov} Krylov in {solves} solves, {seconds:.3g} s".format(**one)
            rows.append(plain(f"{case} ({spent})", one["cost"], "us per unknown"))
            rows.append(plain(f"{case}, mean of a solve", one["mean"], "Krylov"))
        its, mean, cost = ([one[key] for one in found.values()] for key in ("iterations", "mean", "cost"))
        long = [one["cost"] for nt, one in found.items() if nt >= 256] or cost
        return [
            *rows,
            bar("Burgers SQP, change over nt", spread(its), "SQP its", 1),
            bar("Burgers SQP, change of the mean over nt", spread(mean), "Krylov", 3),
            bar(f"Burgers SQP, largest time per unknown / that of nt {min(found)}", max(cost) / cost[0], "x", 1.3),
            plain("Burgers SQP, largest / smallest time per unknown, nt >= 256", max(long) / min(long), "x"),
        ]

    def inexact(self) -> list[Row]:
        """Controlled inexactness against tight tolerances."""
        loose = sqp("-nt", self.middle, repeat=self.repeat)
        tight = sqp("-nt", self.middle, *(word for name in FIXED for word in (name, 1e-10)), repeat=self.repeat)
        rows = []
        for name, one in (("controlled", loose), ("fixed at 1e-10", tight)):
            case = f"Burgers SQP, nx 64, nt {self.middle}, tolerances {name} ({one['iterations']} its)"
            rows += [plain(case, one["krylov"], "Krylov"), plain(case, one["seconds"], "s")]
        krylov, its = (loose[key] / tight[key] for key in ("krylov", "iterations"))
        return [
            *rows,
            bar("Krylov iterations, controlled / fixed", krylov, "x", 0.5),
            bar("SQP iterations, controlled / fixed", its, "x", 1.5),
        ]

    def burgers_speed(self) -> list[Row]:
        """Burgers to 1e-8 on one core."""
        rows, cpu, n = [], [], 32 if self.quick else 160
        for kind in ("composite", "newton"):
            for control in ("interval", "nodal"):
                words = ["-nx", n, "-nt", n, "-sqp_type", kind, "-sqp_kkt_precond", "wathen", "-control", control]
                one = sqp(*words, repeat=self.repeat)
                case = f"Burgers {kind}, nx = nt = {n}, control {control}"
                rows.append(plain(f"{case} ({one['iterations']} its, {one['krylov']} Krylov)", one["cpu"], "CPU s"))
                if control == "interval":
                    cpu.append(one["cpu"])
        return [
            *rows,
            bar(f"Burgers, nx = nt = {n}, the better of both", min(cpu), "CPU s", 2),
            plain(f"the same / {FASTEST:.2f} s", min(cpu) / FASTEST, "x"),
        ]

    def klein_gordon(self) -> list[Row]:
        """Waves: iterations against steps."""
        rows, steps = [], (32, 64) if self.quick else (64, 128, 256, 512, 1024, 2048)
        for hessian, limits in (("metric", (30, 8)), ("gauss-newton", (None, None))):
            counts = []
            for nt in steps:
                found = run(WORK, "kkt", "klein_gordon", "-nx", 64, "-nt", nt, "-hessian", hessian)
                counts.append(worst(found))
                case = f"Klein-Gordon, {hessian}, nt {nt} ({note(found)})"
                rows.append(bar(case, counts[-1], "iterations", limits[0]))
            rows.append(bar(f"Klein-Gordon, {hessian}, growth over nt", spread(counts), "iterations", limits[1]))
        return rows

    def rivals(self) -> list[Row]:
        """The default against serial solvers, and against factors of the whole matrix."""
        nt, quiet = self.middle, ["-only_newton", "-repeat", self.repeat]
        found = {
            "default": self.heat("-nt", nt, *quiet),
            "serial matched MINRES": self.heat("-nt", nt, "-repeat", self.repeat, task="minres"),
            "serial matched GMRES": self.heat("-nt", nt, *quiet, *SERIAL),
        }
        rows, (default, minres, gmres) = [], (one["seconds"] for one in found.values())
        for name, one in found.items():
            reached = "{iterations} its, residual {residual:.0e}, dual {dual_residual:.0e}".format(**one["newton"])
            rows.append(plain(f"heat, nt {nt}, {name} ({reached})", one["seconds"], "s"))
        rows.append(bar("serial matched MINRES / default", minres / default, "x", 1, at_most=False))
        rows.append(plain("serial matched GMRES / default", gmres / default, "x"))
        return [*rows, *self._direct()]

    def _direct(self) -> list[Row]:
        """MUMPS, as far as this machine's memory goes."""
        rows, needed = [], 0.0
        for nt in (16, 32) if self.quick else (64, 128, 256):
            if 2.3 * needed > 0.9 * memory_mb():  # twice as many steps take a little more than twice as much
                rows.append(plain(f"heat, nt {nt}, MUMPS: left out, it needs about", 2.3 * needed, "MB"))
                break
            default = self.heat("-nt", nt, "-only_newton", "-repeat", self.repeat)
            try:
                direct = self.heat("-nt", nt, "-only_newton", "-precond", "direct")
            except RuntimeError:
                direct = {"newton": {"converged": False}}
            if not direct["newton"]["converged"]:  # its factors outgrow this machine, or 32-bit integers
                rows.append(show(Row(f"heat, nt {nt}, MUMPS: did not finish", None, "s")))
                break
            needed = direct["peak_mb"] - direct["base_mb"]
            for name, one in (("MUMPS", direct), ("default", default)):
                rows.append(plain(f"heat, nt {nt}, {name}", one["seconds"], "s"))
                case = f"heat, nt {nt}, {name}, above problem set-up"
                rows += [
                    plain(case, one["peak_mb"] - one["base_mb"], "MB"),
                    plain(f"heat, nt {nt}, {name}, all", one["peak_mb"], "MB peak"),
                ]
            rows.append(bar(f"nt {nt}, MUMPS / default, time", direct["seconds"] / default["seconds"], "x", 5, False))
            memory = needed / (default["peak_mb"] - default["base_mb"])
            rows.append(bar(f"nt {nt}, MUMPS / default, memory", memory, "x", 10, False))
        return rows

    def ranks(self) -> list[Row]:
        """Two ranks against one."""
        words = ["-nt", self.middle, "-only_newton", "-repeat", self.repeat]
        one, two = (self.heat(*words, ranks=ranks)["seconds"] for ranks in (1, 2))
        rows = [plain(f"heat, nt {self.middle}, {name}", s, "s") for name, s in (("1 rank", one), ("2 ranks", two))]
        return [*rows, bar("two ranks against one", one / two, "x", 1.6, at_most=False)]

    def memory(self) -> list[Row]:
        """Memory against steps."""
        rows, per_step, steps = [], [], self.steps[1:]
        for nt in steps:
            found = self.heat("-nt", nt)
            per_step.append((found["peak_mb"] - found["imports_mb"]) / nt)
            rows += [
                plain(f"heat, nt {nt}", found["peak_mb"], "MB peak"),
                plain(f"heat, nt {nt}, above imports", per_step[-1], "MB a step"),
            ]
        frugal = self.heat("-nt", steps[-1], *FRUGAL)
        return [
            *rows,
            bar(f"memory a step, nt {steps[-1]} / {steps[0]}", per_step[-1] / per_step[0], "x", 1.1),
            plain(f"heat, nt {steps[-1]}, default, all", found["peak_mb"], "MB peak"),
            bar(
                f"heat, nt {steps[-1]}, CG on S, all ({frugal['newton']['iterations']} its)",
                frugal["peak_mb"],
                "MB peak",
                4096,
            ),
        ]

    def variants(self) -> list[Row]:
        """Iteration tables of the published kind: variants against steps, regularization and windows."""
        rows, lines = [], {}
        axes = "nt:32,64,128,256;alpha:1,1e-2,1e-4,1e-6,1e-8;mgrit_window,block_jacobi_window:4,8,16,32"
        words = ["-nx", 15, "-ny", 5, "-nt", 64, "-cap", CAP, "-axes", "nt:32,64" if self.quick else axes]
        for name, own in VARIANTS.items():
            found = run(WORK, "table", "heat", *words, *own)
            names = [f"{axis.removeprefix('mgrit_')} {value}" for axis, value, _ in found]
            lines[name] = [iterations for _, _, iterations in found]
            rows += [Row(f"heat 15 x 5, nt 64, {at}: {name}", its, "iterations") for at, its in zip(names, lines[name])]
        table(f"heat 15 x 5, nt 64, iterations; -: none in {CAP}", names, lines)
        return rows

    def hard(self) -> list[Row]:
        """Problems where ways to solve KKT systems differ, by `auto`, by means over time, and by others at 64 steps."""
        rows = []
        for name in NAMES:
            for nt in (16,) if self.quick else (64,) if name.endswith("hypre") else (64, 256, 1024):
                for alpha in (1e-5, 1e-6) if name == "bounds" else (1e-3, 1e-6):
                    for way in ("auto", "circulant", "reduced", "wathen")[: 4 if nt == 64 else 2]:
                        found = run(HARD, name, "-nt", nt, "-alpha", alpha, "-precond", way)
                        counts = "{iterations} its, {krylov} Krylov, at most {most} a step".format(**found)
                        said = counts if found["converged"] else found["why"]
                        met = found["converged"] if way == "auto" else None
                        case = f"{name}, nt {nt}, alpha {alpha:g}, {way} ({said})"
                        rows.append(show(Row(case, found["cpu"], "CPU s", "converges" if met is not None else "", met)))
        return rows


def sqp(*words: object, repeat: int) -> dict[str, Any]:
    """What a run on Burgers' equation needs, with 64 elements where the words give no other number."""
    size = [] if "-nx" in words else ["-nx", 64]
    return run(WORK, "sqp", "burgers", *size, *words, "-repeat", repeat)


def worst(found: dict[str, Any]) -> int:
    """Iterations of the harder right-hand side."""
    return max(found[rhs]["iterations"] for rhs in ("newton", "random"))


def note(found: dict[str, Any]) -> str:
    """Both right-hand sides in words: iterations/applications of the Schur complement, and dual residual."""
    words = "{} {iterations}/{applications} {dual_residual:.0e}"
    return ", ".join(
        words.format(rhs, **found[rhs]) + ("" if found[rhs]["converged"] else " not converged")
        for rhs in ("newton", "random")
    )


def spread(counts: Sequence[float]) -> float:
    """The largest less the smallest."""
    return max(counts) - min(counts)


CASES: dict[str, Callable[[Benchmark], list[Row]]] = {
    name: getattr(Benchmark, name)
    for name in (
        "heat_steps",
        "windows",
        "meshes",
        "burgers_steps",
        "inexact",
        "burgers_speed",
        "klein_gordon",
        "rivals",
        "ranks",
        "memory",
        "variants",
        "hard",
    )
}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("-repeat", type=int, default=3, help="repetitions of timings, of which the median counts")
    parser.add_argument("-quick", action="store_true", help="small sizes: does it run?")
    options = parser.parse_args(argv)
    return measure(CASES, options.only, Benchmark(options.quick, options.repeat), options.json)


if __name__ == "__main__":
    main()
