"""Heat in a cube, ranks split into time x space: the same optimum, memory and CPU seconds of a rank, messages.

    python -m problems.benchmarks.space_time split memory large speed messages -json build/space_time.json

Each run is under mpiexec of its own. CPU seconds are those of the busiest rank, memory is that above the imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from typing import Any

from mpi4py import MPI

from problems.benchmarks.processes import Row, bar, measure, peak_mb, plain, run

#: Ranks in time and in space.
SPLITS = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4))

#: Memory for an unknown of a rank, KiB, with which 10^6 of them and 4 steps fit on two ranks into 1.5 and 4 GiB each,
#: imports included.
ROOM = {"reduced": 2.4, "wathen": 7.7}

MODULE = "problems.benchmarks.space_time"


def split(size: argparse.Namespace) -> list[Row]:
    """Objective and iterations on every split, against one rank."""
    rows, first = [], None
    for time, space in SPLITS:
        found = _solve(time, space, size.n, size.nt)
        first = first or found
        name = f"heat3d {size.n}^3, nt {size.nt}, alpha 1e-4, {time}x{space}"
        rows.append(bar(f"{name}: objective against 1x1", abs(found["objective"] / first["objective"] - 1), "", 1e-9))
        difference = abs(found["krylov"] - first["krylov"])
        rows.append(bar(f"{name}: Krylov iterations, {found['krylov']}, against 1x1", difference, "", 1))
        rows.append(plain(f"{name}: CPU seconds of a rank", found["cpu"], "s"))
    return rows


def memory(size: argparse.Namespace) -> list[Row]:
    """Memory of a rank above the imports."""
    rows, found = [], {space: _solve(1, space, size.memory_n, size.memory_nt)["memory"] for space in (1, 2, 4)}
    for space, limit in ((1, None), (2, 0.55), (4, 0.3)):
        name = f"heat3d {size.memory_n}^3, nt {size.memory_nt}, 1x{space}: memory a rank"
        rows.append(plain(name, found[space], "MB"))
        rows.append(bar(f"{name} against 1x1", found[space] / found[1], "x", limit))
    return rows


def large(size: argparse.Namespace) -> list[Row]:
    """Memory of large steps, multigrid in space, on two ranks: see `ROOM`."""
    words = ("-step_pc_type", "hypre", "-sqp_kkt_precond", size.large_precond, "-alpha", 0.1)
    found = _solve(1, 2, size.large_n, 4, *words)
    name, room = f"heat3d {size.large_n}^3, nt 4, {size.large_precond}, hypre, 1x2", ROOM[size.large_precond]
    return [
        plain(f"{name}: memory a rank", found["memory"], "MB"),
        bar(f"{name}: memory for an unknown of the rank", found["memory"] * 2**11 / size.large_n**3, "KiB", room),
        plain(f"{name}: CPU seconds of a rank", found["cpu"], "s"),
    ]


def speed(size: argparse.Namespace) -> list[Row]:
    """CPU seconds of a rank with multigrid in space."""
    words = ("-step_pc_type", "hypre")
    one, two = (_solve(1, space, size.speed_n, size.speed_nt, *words) for space in (1, 2))
    name = f"heat3d {size.speed_n}^3, nt {size.speed_nt}, hypre: CPU seconds of a rank, 1x1 over 1x2"
    return [bar(name, one["cpu"] / two["cpu"], "x", 1.3, at_most=False)]


def messages(size: argparse.Namespace) -> list[Row]:
    """Messages of an exchange on a rank, and bytes, against what a cut of the cube into slabs or boxes has."""
    rows = []
    for space in (1, 2, 4, 8):
        found = run(MODULE, "exchange", "-n", size.n, "-nt", size.nt, ranks=space)
        rows.append(plain(f"exchange of {size.nt} steps of {size.n}^3 on {space} ranks: messages", found["count"], ""))
        rows.append(bar("  fewer or more than neighbors", abs(found["count"] - found["neighbors"]), "", 0))
        rows.append(bar("  ghosts against the faces of the boxes", abs(found["ghosts"] - found["faces"]), "", 0))
    return rows


CASES = {"split": split, "memory": memory, "large": large, "speed": speed, "messages": messages}


def _solve(time: int, space: int, n: int, nt: int, *words: object) -> dict[str, Any]:
    return dict(
        run(MODULE, "solve", "-n", n, "-nt", nt, "-space_ranks", space, "-alpha", 1e-4, *words, ranks=time * space)
    )


# -- what the processes do -------------------------------------------------------------------------------------


def _work(words: list[str]) -> None:
    """Solve by the options, or exchange once, and print what it took."""
    import petsc4py

    petsc4py.init(words)
    import pdeopt as po
    from problems.heat3d import Heat3dCase, Heat3dSettings

    mpi, before = MPI.COMM_WORLD, peak_mb()
    settings = po.read(Heat3dSettings)
    if words[0] == "exchange":
        found = _exchange(settings)
    else:
        case = Heat3dCase(settings)
        result = po.SQPSolver(case.problem, type="newton", opt_tol=1e-10).solve()
        krylov = sum(record.krylov for record in result.history)
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = mpi.allreduce(used.ru_utime + used.ru_stime, MPI.MAX)
        found = {"objective": result.objective, "iterations": result.iterations, "krylov": krylov, "cpu": cpu}
        found["memory"] = mpi.allreduce(peak_mb() - before, MPI.MAX)
    if mpi.rank == 0:
        print(json.dumps(found))


def _exchange(settings: Any) -> dict[str, int]:
    import torch

    import pdeopt as po

    mpi, n = MPI.COMM_WORLD, settings.n
    patch = po.grid_layout(mpi, (n, n, n))
    layout, count = patch.layout, [0]

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(mpi, name)

        def Isend(self, *args: Any) -> Any:
            count[0] += 1
            return mpi.Isend(*args)

    layout.mpi = Counted()
    layout.extend(torch.zeros(settings.nt, layout.n_owned, dtype=torch.float64))
    lengths = [each.stop - each.start for each in patch.box]
    faces = 0
    for k, each in enumerate(patch.box):
        area = layout.n_owned // lengths[k]
        faces += area * (int(each.start > 0) + int(each.stop < n))
    found = {"count": count[0], "neighbors": len(layout.neighbors), "ghosts": layout.n_ghost, "faces": faces}
    return {name: mpi.allreduce(value, MPI.MAX) for name, value in found.items()}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure the cases of the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=list(CASES))
    parser.add_argument("-n", type=int, default=24)
    parser.add_argument("-nt", type=int, default=32)
    parser.add_argument("-memory_n", type=int, default=48)
    parser.add_argument("-memory_nt", type=int, default=8)
    parser.add_argument("-large_n", type=int, default=46)
    parser.add_argument("-large_precond", choices=list(ROOM), default="reduced")
    parser.add_argument("-speed_n", type=int, default=32)
    parser.add_argument("-speed_nt", type=int, default=8)
    parser.add_argument("-json", default="")
    size = parser.parse_args(argv)
    return measure(CASES, size.cases or list(CASES), size, size.json)


if __name__ == "__main__":
    if sys.argv[1:2] in (["solve"], ["exchange"]):
        _work(sys.argv[1:])
    else:
        main()
