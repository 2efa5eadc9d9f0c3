"""Training by splitting against its published run: memory, messages and speed-up; accuracy against CPU seconds.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.admm -only memory messages speedup -plot build/admm.png

784-500-500-10 with hard sigmoids on 60,000 samples in double precision, as published (slides of 2023: C, GSL and MPI
on 1 to 64 processes); MNIST from `-data_dir`, else numbers of its size. Runs of up to 8 ranks are made, the others
predicted by `admm_model` from costs that are measured here. -only accuracy is `admm_accuracy`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from nn_adapters.splitting import SplitTrainingSettings, StreamedLayers, WholeLayers
from pdeopt.core.messages import even_parts
from pdeopt.squares.gramshares import GramShares
from problems.benchmarks.admm_costs import measured_costs
from problems.benchmarks.admm_model import Counts, Prediction, shapes_of, streaming_counts, whole_counts
from problems.benchmarks.admm_picture import picture
from problems.benchmarks.admm_work import WIDTHS, published_network
from problems.benchmarks.processes import Row, bar, measure, plain, run, show, table

WORK = "problems.benchmarks.admm_work"

#: Of the published run on 1, 2, 4 ... 64 processes: seconds to convergence, and megabytes of a process.
PUBLISHED_SECONDS = {1: 2557.0, 2: 1693.0, 4: 1276.0, 8: 1112.0, 16: 1041.0, 32: 954.0, 64: 915.0}
PUBLISHED_MB = {1: 1915.0, 2: 749.0, 4: 378.0, 8: 237.0, 16: 140.0, 32: 92.0, 64: 76.0}

SAMPLES, MB = 60_000, 1e6


class OneOf:
    """The first of some ranks, on its own: enough to ask for predictions."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def allgather(self, own: Any) -> list[Any]:
        """As if all others had the same."""
        return [own] * self.size


class Benchmark:
    """Tables and pictures; see `main` for the options."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def work(self, form: str, ranks: int, *words: object) -> list[dict[str, Any]]:
        """What each rank of a run has found."""
        data = ["-data_dir", self.options.data_dir] if self.options.data_dir else []
        return list(run(WORK, "-form", form, "-samples", self.options.samples, *words, *data, ranks=ranks))

    # -- memory ------------------------------------------------------------------------------------------------

    def memory(self) -> list[Row]:
        """Megabytes of a process, published and here."""
        lines, rows, samples = {}, list[Row](), self.options.samples
        for ranks in PUBLISHED_MB:
            predicted = predicted_memory("seed", samples, ranks)
            above, observed = sum(predicted.values()) - predicted["process"], None
            talk = 5.176 + 974.4 * samples / SAMPLES / ranks
            if ranks <= self.options.ranks:
                found = self.work("seed", ranks, "-iterations", 2)
                observed = max(one["observed"] - one["imports"] for one in found)
                rows += self._judge(ranks, found, above, observed, talk)
            shown = (talk, PUBLISHED_MB[ranks], predicted["data"] / MB, above / MB, observed and observed / MB)
            lines[str(ranks)] = (*shown, predicted["process"] / MB)
        columns = ["talk predicted", "talk observed", "data", "predicted", "observed", "imports"]
        table("processes, MB of one", columns, lines)
        for name, size in predicted_memory("seed", samples, 1).items():
            rows.append(plain(f"one rank, predicted: {name}", size / MB, "MB"))
        return [*rows, *self._of_streams()]

    def _judge(self, ranks: int, found: list[dict[str, Any]], above: float, observed: float, talk: float) -> list[Row]:
        imports = max(one["imports"] for one in found)
        rows = [
            bar(
                f"{ranks} ranks: observed / predicted, imports and all",
                (imports + observed) / (imports + above),
                "x",
                1.1 if ranks == 1 else None,
            )
        ]
        rows.append(plain(f"{ranks} ranks: observed / predicted, above imports", observed / above, "x"))
        if ranks == 1:
            data = found[0]["predicted"]["data"] / MB
            rows.append(
                bar("1 rank: above imports / (talk's prediction + data)", observed / MB / (talk + data), "x", 1.05)
            )
        return rows

    def _of_streams(self) -> list[Row]:
        rows = []
        for samples in (self.options.samples // 4, self.options.samples):
            words = ("-samples", samples, "-batch", 1000, "-iterations", 12)
            (found,) = run(WORK, "-form", "streaming", *words)
            rest = found["observed"] - found["imports"] - found["predicted"]["data"]
            parts = found["predicted"]
            expected = sum(parts.values()) - parts["process"] - parts["data"]
            rows.append(plain(f"streaming, {samples} samples: above imports and data", rest / MB, "MB"))
            rows.append(plain(f"streaming, {samples} samples: the same, observed / predicted", rest / expected, "x"))
        return rows

    # -- messages ----------------------------------------------------------------------------------------------

    def messages(self) -> list[Row]:
        """Bytes of an iteration, by the formula, and sent by a run."""
        shapes, rows = shapes_of(WIDTHS), []
        for ranks in (2, 8, 64):
            shares = GramShares(shapes, ranks)
            each = [shares.numbers(rank) for rank in range(ranks)]
            sums = sum(one["sums"] for one in each)
            whole = (ranks - 1) * sum(n * n + m * n for n, m in shapes)
            both = 2 * whole  # sums to all ranks: reduced, and gathered
            everything = sum(sum(one.values()) for one in each)
            rows.append(bar(f"{ranks} ranks: sums / those of whole matrices", 100 * sums / whole, "%", 69))
            rows.append(bar(f"{ranks} ranks: the same in bf16 / float64", 100 * sums / whole / 4, "%", 17.5))
            rows.append(plain(f"{ranks} ranks: the same in bf16 / float32", 100 * sums / whole / 2, "%"))
            rows.append(
                plain(f"{ranks} ranks: all messages / an allreduce of whole matrices", 100 * everything / both, "%")
            )
            alone = [GramShares([shape], ranks) for shape in shapes]
            later = sum(one.numbers(r, matrices=k > 0)["sums"] for k, one in enumerate(alone) for r in range(ranks))
            rows.append(plain(f"{ranks} ranks: all samples: sums after the first iteration", 100 * later / whole, "%"))
        for precision, width in (("float64", 8), ("bfloat16", 2)):
            found = self.work("streaming", 2, "-batch", 400, "-precision", precision, "-iterations", 2)
            expected = [streaming_counts(WIDTHS, 200, 2, rank, width).sent for rank in range(2)]
            equal = expected == [one["rounds"][-1]["bytes"] for one in found]
            rows.append(_yes(f"2 ranks, {precision}: bytes sent are those of the formula", equal))
        return rows

    # -- speed-up ----------------------------------------------------------------------------------------------

    def speedup(self) -> list[Row]:
        """Seconds of an iteration, measured on 1 and 2 ranks, predicted on others; counts checked on up to 8."""
        costs = measured_costs(self.options.latency, self.options.bandwidth)
        model = Prediction(WIDTHS, costs[0], share_of_states=costs[1])
        rows = [*self._counts(), *self._streaming()]
        whole = {ranks: self.work("seed", ranks, "-iterations", 3) for ranks in (1, 2)}
        own = {ranks: slowest(found, lambda one: one["cpu"] - one["mpi"]) for ranks, found in whole.items()}
        everything = {ranks: slowest(found, lambda one: one["cpu"]) for ranks, found in whole.items()}
        wall = {ranks: slowest(found, lambda one: one["wall"]) for ranks, found in whole.items()}
        for name, seconds in (("without calls of MPI", own), ("and waiting", everything), ("by the clock", wall)):
            rows.append(plain(f"all samples, 1 rank, CPU seconds of an iteration {name}", seconds[1], "s"))
            rows.append(plain(f"all samples, 2 ranks, speed-up {name}", seconds[1] / seconds[2], "x"))
        samples = self.options.samples
        for ranks in (1, 2):
            found = model.iteration(samples, ranks)
            predicted = found.local + found.solves
            rows.append(plain(f"all samples, {ranks} ranks, predicted / measured work", predicted / own[ranks], "x"))
        return [*rows, *self._scaling(model, samples, everything)]

    def _scaling(self, model: Prediction, samples: int, measured: Mapping[int, float]) -> list[Row]:
        """Strong scaling, with the numbers of ranks from which its parts are large, and weak scaling."""
        one, before = (model.iteration(samples, 1, published).seconds for published in (False, True))
        strong = [2**k for k in range(16) if 2**k <= samples]
        trees = Prediction(WIDTHS, replace(model.costs, tree=True), share_of_states=model.share_of_states)
        lines = {}
        for ranks in strong:
            found, talk = model.iteration(samples, ranks), PUBLISHED_SECONDS.get(ranks)
            parts = (found.local, found.solves, found.messages, found.hidden, found.seconds)
            others = (
                before / model.iteration(samples, ranks, published=True).seconds,
                one / trees.iteration(samples, ranks).seconds,
            )
            published = (talk, talk and PUBLISHED_SECONDS[1] / talk)
            lines[f"{ranks:,}"] = (*published, *(1e3 * part for part in parts), one / found.seconds, *others)
        columns = [
            "talk, s",
            "talk, x",
            "samples, ms",
            "solves, ms",
            "messages, ms",
            "of these hidden, ms",
            "all, ms",
            "x",
            "x, inverses everywhere",
            "x, sums by trees",
        ]
        table("ranks", columns, lines)
        late = (each for each in strong if (it := model.iteration(samples, each)).hidden < it.beside)
        points = {
            f"{part} outweigh the work on samples from": model.crossover(samples, strong, part)
            for part in ("solves", "messages")
        }
        points["sums take longer than the states they travel beside from"] = next(late, None)
        rows = [bar("64 ranks, predicted speed-up", one / model.iteration(samples, 64).seconds, "x", 20, at_most=False)]
        rows += [plain(name, ranks or float("inf"), "ranks") for name, ranks in points.items()]
        weak = {ranks: model.iteration(1000 * ranks, ranks).seconds for ranks in (2**k for k in range(0, 17, 2))}
        rows += [
            plain(f"1000 samples a rank, {ranks} ranks: efficiency", 100 * weak[1] / s, "%")
            for ranks, s in weak.items()
        ]
        if self.options.plot:
            picture(self.options.plot, model, samples, strong, PUBLISHED_SECONDS, measured)
        return rows

    def _counts(self) -> list[Row]:
        """Multiplications and bytes of real runs against the formulas."""
        rows = []
        for ranks in (1, 2, 4, 8):
            found = run(WORK, "-form", "seed", "-samples", 803, "-iterations", 2, ranks=ranks)
            words = ("-form", "streaming", "-samples", 800, "-batch", 800, "-precision", "float32", "-iterations", 2)
            stream = run(WORK, *words, ranks=ranks)
            equal = [
                _same(one["rounds"][place], whole_counts(WIDTHS, 803, ranks, rank, 8, place == 0))
                for rank, one in enumerate(found)
                for place in (0, 1)
            ] + [
                _same(one["rounds"][1], streaming_counts(WIDTHS, own, ranks, rank, 4))
                for rank, (one, own) in enumerate(zip(stream, even_parts(800, ranks)))
            ]
            rows.append(_yes(f"{ranks} ranks: counted work is that of the formulas", all(equal)))
        return rows

    def _streaming(self) -> list[Row]:
        """A batch of 8000, on one rank and on two."""
        found = {
            ranks: self.work("streaming", ranks, "-batch", 8000, "-iterations", 6, "-precision", "float32")
            for ranks in (1, 2)
        }
        rows = []
        for name, key, limit in (
            ("CPU, waiting and all", lambda one: one["cpu"], 1.7),
            ("CPU without calls of MPI", lambda one: one["cpu"] - one["mpi"], None),
            ("by the clock", lambda one: one["wall"], None),
        ):
            one, two = (slowest(found[ranks], key) for ranks in (1, 2))
            rows.append(plain(f"streaming, batch 8000, 1 rank, seconds of an iteration: {name}", one, "s"))
            rows.append(bar(f"streaming, 4000 a rank, 2 ranks, speed-up: {name}", one / two, "x", limit, at_most=False))
        return rows

    # -- accuracy ----------------------------------------------------------------------------------------------

    def accuracy(self) -> list[Row]:
        """Test accuracy against seconds, `admm_accuracy`, with its own files."""
        from problems.benchmarks import admm_accuracy

        return admm_accuracy.main(["-data_dir", self.options.data_dir])


def slowest(found: list[dict[str, Any]], seconds: Callable[[dict[str, float]], float]) -> float:
    """Of the iterations after the first: the median of the slowest rank's seconds."""
    rounds = zip(*(one["rounds"][1:] for one in found))
    return statistics.median(max(map(seconds, each)) for each in rounds)


def predicted_memory(form: str, samples: int, ranks: int) -> dict[str, int]:
    """Bytes of the first of so many ranks, from shapes."""
    own = even_parts(samples, ranks)[0]
    x, y = torch.zeros(own, WIDTHS[0], dtype=torch.float64), torch.zeros(own, dtype=torch.int64)
    team: Any = None if ranks == 1 else OneOf(ranks)
    settings = SplitTrainingSettings(form=form, precision="float64")
    words = (published_network(), x, y, settings, team)
    return (StreamedLayers(1, *words) if form == "streaming" else WholeLayers(*words)).predicted_memory()


def _yes(case: str, found: bool) -> Row:
    """A row that says whether something holds."""
    return show(Row(case, float(found), "1: yes", "= 1", found))


def _same(found: dict[str, float], expected: Counts) -> bool:
    """Whether a run did what the formulas say, to rounding of sums of floats."""
    pairs = ((found["products"], expected.products), (found["solves"], expected.solves))
    return found["bytes"] == expected.sent and all(abs(one - other) <= 1e-12 * other for one, other in pairs)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the cases, print, write and draw."""
    cases = {name: getattr(Benchmark, name) for name in ("memory", "messages", "speedup", "accuracy")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-only", nargs="+", choices=cases, default=["memory", "messages", "speedup"], help="these alone"
    )
    parser.add_argument("-data_dir", default="", help="folder with MNIST; else numbers of its size")
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-plot", default="", help="write a picture of the speed-up to this file")
    parser.add_argument("-samples", type=int, default=SAMPLES, help="fewer of them, to try")
    parser.add_argument("-ranks", type=int, default=8, help="the most whose memory is observed")
    parser.add_argument("-latency", type=float, default=2e-6, help="predicted: seconds of a message")
    parser.add_argument("-bandwidth", type=float, default=1e10, help="predicted: bytes a second")
    options = parser.parse_args(argv)
    if "accuracy" in options.only and not options.data_dir:
        parser.error("-only accuracy needs -data_dir, the folder of the data sets")
    return measure(cases, options.only, Benchmark(options), options.json)


if __name__ == "__main__":
    main()
