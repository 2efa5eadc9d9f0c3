"""Networks as control problems: Gauss-Newton steps against Adam and L-BFGS, by work and CPU seconds to a value.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.network_sqp -json build/network_sqp.json
    OMP_NUM_THREADS=1 python -m problems.benchmarks.network_sqp -only small price

Peaks, width 8, T = 5, tanh; opening, layers and head are unknown, in double precision, from the first weights of
PyTorch; J = cross-entropy + 1e-5/2 (sum_k dt |z_k|^2 + |p|^2) of all samples. Work is in gradients; CPU seconds are
those of this process, on one thread, without evaluations of the test accuracy. Adam is PyTorch's, full batches, with
PyTorch's derivatives of the same network; L-BFGS has the derivatives by hand that the Gauss-Newton steps have. A run
that does not arrive counts with what it took until it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.data import peaks
from pdeopt.optimize import curved_function
from problems.benchmarks.processes import Row, bar, execute, plain, write
from problems.shared.sqp_training import dense_control

TARGETS = 0.1, 0.03, 0.01, 0.003
RATES = 1e-2, 3e-2
WEIGHT, WIDTH, T = 1e-5, 8, 5.0

#: (work, CPU seconds) at each target that was reached.
Reached = dict[float, tuple[float, float]]


class Case:
    """A network and its samples.

    Args:
        layers, samples, seed: sizes, and the seed of both.
    """

    def __init__(self, layers: int, samples: int, seed: int) -> None:
        data = peaks(seed, test=798)
        torch.manual_seed(seed)
        self.opening = nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh())
        self.layers = nna.LayerParallel(None, lambda: nna.dense(WIDTH, "tanh"), layers, T)
        self.head = nn.Linear(WIDTH, 5)
        self.x, self.y = data.x_train[:samples].double(), data.y_train[:samples]
        self.data, self.dt = data, T / layers

    def problem(self) -> tuple[po.ControlProblem, torch.Tensor]:
        """As a control problem, and its first design."""
        return dense_control(self.opening, self.layers, self.head, self.x, self.y, WEIGHT)

    def gauss_newton(self, most: float, states: str = "eliminated", **words: Any) -> Reached:
        """By Gauss-Newton steps."""
        problem, x = self.problem()
        function = curved_function(problem, states=states)
        watch = Watch()
        method = po.GaussNewton(function, max_work=most, target=min(TARGETS), max_it=10_000, **words)
        method.minimize(x, monitors=[lambda record: watch(record.work, record.objective)])
        return watch.reached

    def lbfgs(self, most: float) -> Reached:
        """By L-BFGS with the same derivatives."""
        problem, x = self.problem()
        watch = Watch()
        method = po.LBFGS(curved_function(problem), max_work=most, target=min(TARGETS), max_it=10_000, memory=20)
        method.minimize(x, monitors=[lambda record: watch(record.work, record.objective)])
        return watch.reached

    def adam(self, most: float, lr: float) -> Reached:
        """By Adam on PyTorch's modules."""
        network = nn.Sequential(self.opening, self.layers.serial(), self.head).double()
        parts = list(network.parameters())
        prices = [self.dt if any(p is q for q in network[1].parameters()) else 1.0 for p in parts]
        optimizer, watch = torch.optim.Adam(parts, lr=lr), Watch()
        for step in range(1, int(most) + 1):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(self.x), self.y)
            loss = loss + 0.5 * WEIGHT * sum(price * p.square().sum() for price, p in zip(prices, parts))
            loss.backward()  # type: ignore[no-untyped-call]
            if watch(step, float(loss.detach())) <= min(TARGETS):
                break
            optimizer.step()
        return watch.reached


class Watch:
    """Notes when targets are reached."""

    def __init__(self) -> None:
        self.begin, self.reached = time.process_time(), Reached()

    def __call__(self, work: float, value: float) -> float:
        self.last = work, time.process_time() - self.begin
        for target in TARGETS:
            if value < target and target not in self.reached:
                self.reached[target] = self.last
        return value


def compared(
    name: str, layers: int, samples: int, works: tuple[float, float], shares: tuple[float, float]
) -> list[Row]:
    """All methods on three seeds; the worst seed is judged."""
    methods: dict[str, Callable[[Case], Reached]] = {
        "Gauss-Newton": lambda case: case.gauss_newton(1200),
        "Gauss-Newton, states unknown": lambda case: case.gauss_newton(1200, "unknown"),
        **{f"Adam {lr:g}": lambda case, lr=lr: case.adam(2000, lr) for lr in RATES},  # type: ignore[misc]
        "L-BFGS": lambda case: case.lbfgs(2000),
    }
    found: dict[str, list[Reached]] = {method: [] for method in methods}
    for seed in range(3):
        for method, train in methods.items():  # in turn, so that other load meets all of them
            found[method].append(train(Case(layers, samples, seed)))
    rows, worst = [], {}
    for method, runs in found.items():
        for target in TARGETS:
            work, seconds = zip(*(each.get(target, (math.inf, math.inf)) for each in runs))
            worst[method, target] = max(seconds)
            words = ", ".join("-" if math.isinf(w) else f"{w:.0f} ({s:.2f} s)" for w, s in zip(work, seconds))
            rows.append(plain(f"{name}: {method} to {target:g}: {words}; worst work", max(work), "gradients"))
    for target, limit in zip((0.01, 0.003), works):
        mine = max(each.get(target, (math.inf, 0))[0] for each in found["Gauss-Newton"])
        rows.append(bar(f"{name}: Gauss-Newton to {target:g}, worst of 3 seeds", mine, "gradients", limit))
        adam = min(worst[f"Adam {lr:g}", target] for lr in RATES)
        for rival, seconds, share in (
            ("the better Adam", adam, shares[0]),
            ("L-BFGS", worst["L-BFGS", target], shares[1]),
        ):
            ratio = worst["Gauss-Newton", target] / seconds
            rows.append(bar(f"{name}: CPU to {target:g} by that of {rival}, worst seeds", ratio, "", share))
    return rows


def small() -> list[Row]:
    """16 layers, 500 samples."""
    return compared("16 layers", 16, 500, (400, 550), (0.5, math.inf))


def deep() -> list[Row]:
    """64 layers, 1000 samples."""
    return compared("64 layers", 64, 1000, (700, 1000), (0.5, 0.8))


def sampled() -> list[Row]:
    """5000 samples, the curvature of 500 of them at first."""
    rows = []
    for seed in range(3):
        words = ("-solver", "sqp", "-layers", 16, "-seed", seed, "-gn_samples", 500, "-max_cpu_seconds", 3)
        found = summary(*words)
        reached = [each for each in found["curve"] if each["objective"] < 0.1]
        work = reached[0]["work"] if reached else math.inf
        rows.append(bar(f"5000 samples, seed {seed}: J < 0.1", work, "gradients", 80))
        accuracy = 100 * max(each["test_accuracy"] for each in found["curve"])
        rows.append(bar(f"5000 samples, seed {seed}: test accuracy in 3 CPU s", accuracy, "%", 98.5, at_most=False))
    return rows


def price() -> list[Row]:
    """A product by a gradient, least of several measurements."""
    rows = []
    for layers, samples in ((16, 500), (64, 1000)):
        problem, x = Case(layers, samples, 0).problem()
        function = curved_function(problem)
        curvature = function.at(x).curvature()
        curvature.product(x)
        gradient = _seconds(lambda: function.value_and_gradient(x))  # noqa: B023
        product = _seconds(lambda: curvature.product(x))  # noqa: B023
        rows.append(plain(f"{layers} layers, {samples} samples: a gradient", 1e3 * gradient, "CPU ms"))
        rows.append(bar(f"{layers} layers: a Gauss-Newton product by a gradient", product / gradient, "", 1.5))
        factors = _seconds(curvature.factors)
        rows.append(plain(f"{layers} layers: Kronecker factors by a gradient", factors / gradient, ""))
    return rows


def _seconds(call: Callable[[], Any], calls: int = 20) -> float:
    best = math.inf
    for _ in range(7):
        begin = time.process_time()
        for _ in range(calls):
            call()
        best = min(best, (time.process_time() - begin) / calls)
    return best


def ranks() -> list[Row]:
    """States unknown, sweeps by MGRIT: the same objectives on 1, 2 and 4 ranks, and layers that wait for each other."""
    rows, histories = [], {}
    words = ("-solver", "sqp", "-layers", 64, "-samples", 200, "-opt_max_it", 6)
    mgrit = ("-gn_states", "unknown", "-gn_sweeps", "mgrit", "-layer_mgrit_coarsening", 4)
    serial = summary(*words)
    for count in (1, 2, 4):
        found = summary(*words, *mgrit, ranks=count)
        histories[count] = [each["objective"] for each in found["curve"]]
        most = max(abs(a - b) for a, b in zip(histories[1], histories[count]))
        rows.append(bar(f"states unknown, {count} ranks: objectives against one rank", most, "", 1e-8))
    rows.append(plain("layers one after the other, states eliminated", serial["sequential_layers"], "layers"))
    rows.append(plain("layers one after the other, states unknown, MGRIT", found["sequential_layers"], "layers"))
    rows.append(plain("cycles a sweep", found["cycles"] / found["sweeps"], ""))
    return rows


def one_shot() -> list[Row]:
    """Layers that wait for each other until J < 0.003: states solved for, states unknown, and all in one shot."""
    rows = []
    steps, quasi = (partial(po.GaussNewton, max_work=1200), partial(po.LBFGS, max_work=3000, memory=20))
    ways: dict[str, tuple[Any, dict[str, str]]] = {
        "states eliminated": (steps, {}),
        "states unknown, exact sweeps by MGRIT": (steps, {"states": "unknown", "sweeps": "mgrit"}),
        "one shot, two cycles": (steps, {"sweeps": "one_shot"}),
        "L-BFGS, states solved": (quasi, {}),
        "L-BFGS, one shot, two cycles": (quasi, {"sweeps": "one_shot"}),
    }
    for layers in (64, 256):
        for name, (method, words) in ways.items():
            problem, x = Case(layers, 200, 0).problem()
            function, begin = curved_function(problem, **words), time.process_time()
            result = method(function, target=min(TARGETS), max_it=10_000).minimize(x)
            seconds, case = time.process_time() - begin, f"{layers} layers, {name}"
            rows.append(plain(f"{case}: steps", result.iterations, ""))
            rows.append(plain(f"{case}: layers one after the other", function.chain.count.layers, "layers"))
            rows.append(plain(f"{case}: work", result.history[-1].work, "gradients"))
            rows.append(plain(f"{case}: time on one core", seconds, "CPU s"))
            rows.append(plain(f"{case}: J of solved states", curved_function(problem).value(result.design), ""))
    return rows


def others(data_dir: str = "") -> list[Row]:
    """Networks without derivatives by hand beside Adam, 1000 samples: MNIST and HAR with -data_dir."""
    rows, data = [], ("-data_dir", data_dir) if data_dir else ()
    mnist, har = ("-layers", 8, "-channels", 4), ("-hidden", 32)
    for name, own, seconds, adam in (("mnist", mnist, 30, (15, 5e-3)), ("har_gru", har, 60, (14, 5e-3))):
        words = (*data, *own, "-samples", 1000)
        steps = ("-solver", "sqp", "-gn_samples", 200, "-max_cpu_seconds", seconds)
        last = summary(*words, *steps, script=f"problems.{name}")["curve"][-1]
        rows.append(plain(f"{name}, Gauss-Newton, {last['cpu_seconds']:.0f} CPU s", 100 * last["test_accuracy"], "%"))
        epochs, lr = adam
        found = summary(*words, "-epochs", epochs, "-lr", lr, script=f"problems.{name}")
        rows.append(plain(f"{name}, Adam, {epochs} epochs", 100 * found["test_accuracy"], "%"))
    return rows


def summary(*words: object, ranks: int = 1, script: str = "problems.peaks") -> Any:
    """The summary of a run of a script, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "summary.json"
        execute(script, *words, "-summary", file, ranks=ranks)
        return json.loads(file.read_text())


CASES: dict[str, Callable[..., list[Row]]] = {
    "price": price,
    "small": small,
    "deep": deep,
    "sampled": sampled,
    "ranks": ranks,
    "one_shot": one_shot,
    "others": others,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("-json")
    parser.add_argument("-data_dir", default="", help="folder of the data sets")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    cases = CASES | {"others": partial(others, chosen.data_dir)}
    rows = [row for name in chosen.only for row in cases[name]()]
    if chosen.json:
        write(chosen.json, rows)


if __name__ == "__main__":
    main()
