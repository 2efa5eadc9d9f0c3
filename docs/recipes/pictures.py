"""The pictures of the recipes: each runs the program of its page and draws what it found.

python -m docs.recipes.pictures            # all
python -m docs.recipes.pictures pendulum   # one page
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from tests.helpers.pages import RECIPES, run_program

#: State, control and what they are compared with, in all pictures.
STATE, SECOND, CONTROL, REFERENCE = "#1f77b4", "#2ca02c", "#d62728", "0.55"

DRAWINGS: dict[str, Callable[[SimpleNamespace], Any]] = {}


def drawing(draw: Callable[[SimpleNamespace], Any]) -> Callable[[SimpleNamespace], Any]:
    """Draws the page of the function's name from the variables of its program."""
    DRAWINGS[draw.__name__] = draw
    return draw


def panels(columns: int, height: float = 2.6, **words: Any) -> tuple[Any, Any]:
    """A row of axes, all labeled below with the time unless said otherwise."""
    figure, axes = plt.subplots(1, columns, figsize=(3.6 * columns, height), layout="constrained", **words)
    for ax in np.atleast_1d(axes):
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def over_time(r: SimpleNamespace, component: int) -> Any:
    """A component of the state at the nodes 0..N."""
    first = r.problem.initial_state(r.problem.fields(r.problem.create_primal())[2])
    return np.concatenate([first[None], r.u])[:, component]


def stairs(ax: Any, times: Any, z: Any, label: str = "control $z$") -> None:
    """A control that is constant on each step."""
    ax.stairs(np.asarray(z), times, baseline=None, color=CONTROL, lw=1.8, label=label)


@drawing
def free_final_time(r: SimpleNamespace) -> None:
    _, (left, right) = panels(2)
    t, T = r.T * r.problem.grid.times, 18**0.25
    left.plot(t, over_time(r, 0), color=STATE, label="position $x$")
    left.plot(t, over_time(r, 1), color=SECOND, label="speed $v$")
    stairs(right, t, r.z, "force $z$")
    right.plot([0, T], [6 / T**2, -6 / T**2], "--", color=REFERENCE, label="exact")
    for ax in (left, right):
        ax.set_xlabel("time")
        ax.axvline(T, color=REFERENCE, lw=0.8, ls=":")
        ax.legend(frameon=False)


@drawing
def minimum_time(r: SimpleNamespace) -> None:
    _, (left, right) = panels(2)
    t = r.T * r.problem.grid.times
    left.plot(t, over_time(r, 0), color=STATE, label="position")
    left.plot(t, over_time(r, 1), color=SECOND, label="speed")
    stairs(right, t, r.z)
    right.set(title="force")
    for ax in (left, right):
        ax.set_xlabel("time")
    left.legend(frameon=False)


@drawing
def periodic(r: SimpleNamespace) -> None:
    _, (left, middle, right) = panels(3)
    t = np.r_[r.grid.times, 6.0 + r.grid.times[1:]]
    s = t / 6.0
    left.plot(t, 1.5 * np.sin(2 * np.pi * s) + 0.5 * np.cos(4 * np.pi * s), color=REFERENCE, label="wave")
    left.plot(t, np.r_[r.u[:, 0], r.u[1:, 0]], color=STATE, label="angle")
    left.legend(frameon=False)
    stairs(middle, t, np.r_[r.z, r.z])
    middle.set(title="torque")
    right.plot(*r.u.T, color=STATE)
    right.plot(*r.u[0], "k.")
    right.set(xlabel="angle", ylabel="speed")
    for ax in (left, middle):
        ax.set_xlabel("time")


@drawing
def multistep(r: SimpleNamespace) -> None:
    _, (left, right) = panels(2)
    t = r.problem.grid.times
    left.plot(t, np.sin(t), color=REFERENCE, label="target")
    left.plot(t, np.cos(t), ":", color=REFERENCE, label="without control, nearly")
    left.plot(t, over_time(r, 0), color=STATE, label="state")
    stairs(right, t, r.z)
    for ax in (left, right):
        ax.set_xlabel("time")
        ax.legend(frameon=False, fontsize=7)


@drawing
def integral_constraints(r: SimpleNamespace) -> None:
    _, axes = panels(3)
    t = r.problem.grid.times
    axes[0].plot(t, over_time(r, 0), color=STATE, label="$x$")
    axes[0].plot(t, over_time(r, 1), color=SECOND, label="$y$")
    axes[0].legend(frameon=False)
    stairs(axes[1], t, r.z)
    axes[1].set(title="control")
    axes[2].plot(t, over_time(r, 2), color=CONTROL)
    axes[2].axhline(1.0, color=REFERENCE, ls=":")
    axes[2].set(title="spent")
    for ax in axes:
        ax.set_xlabel("time")


@drawing
def pendulum(r: SimpleNamespace) -> None:
    _, (left, middle, right) = panels(3)
    angle, t = over_time(r, 0), r.grid.times
    shown = np.arange(0, len(t), 3)
    colors = plt.get_cmap("viridis")(t[shown] / t[-1])
    for at, color in zip(shown, colors):
        x, y = np.sin(angle[at]), -np.cos(angle[at])
        left.plot([0, x], [0, y], color=color, lw=0.8, alpha=0.6)
        left.plot(x, y, "o", color=color, ms=5)
    left.set(aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.2, 1.2), xticks=[], yticks=[])
    left.spines[:].set_visible(False)
    left.set_title("start: dark, end: light", fontsize=9)
    middle.plot(t, angle, color=STATE)
    middle.axhline(np.pi, color=REFERENCE, ls=":")
    middle.set(xlabel="time", title="angle", yticks=[-np.pi / 2, 0, np.pi / 2, np.pi])
    middle.set_yticklabels([r"$-\pi/2$", "0", r"$\pi/2$", r"$\pi$"])
    stairs(right, t, r.z)
    right.set(xlabel="time", title="torque")


@drawing
def van_der_pol(r: SimpleNamespace) -> None:
    from tests.test_recipes import pontryagin

    _, (left, right) = panels(2)
    t = r.problem.grid.times
    reference = pontryagin()(t)
    left.plot(t, over_time(r, 0), color=STATE, label="$x$")
    left.plot(t, over_time(r, 1), color=SECOND, label="$y$")
    left.plot(t[::5], reference[:2, ::5].T, ".", color=REFERENCE, label=["boundary value problem", None])
    stairs(right, t, r.z)
    right.plot(t[::5], -0.5 * reference[2, ::5], ".", color=REFERENCE)
    for ax in (left, right):
        ax.set_xlabel("time")
        ax.legend(frameon=False)


@drawing
def receding_horizon(r: SimpleNamespace) -> None:
    _, (left, right) = panels(2)
    left.plot(r.t, np.cos(r.t), color=REFERENCE, label="target")
    left.plot(r.t, np.concatenate(r.path), color=STATE, label="path")
    left.set(xlabel="time", title="first component")
    left.legend(frameon=False)
    right.bar(range(1, len(r.iterations) + 1), r.iterations, color=CONTROL)
    right.set(xlabel="plan", title="Newton iterations")


@drawing
def sensitivities(r: SimpleNamespace) -> None:
    _, (left, right) = panels(2)
    left.stairs(r.z, r.grid.times, baseline=None, color=REFERENCE, label="old control")
    left.stairs(r.z_moved, r.grid.times, baseline=None, color=CONTROL, lw=2.5, alpha=0.5, label="from elsewhere")
    left.stairs(r.predicted, r.grid.times, baseline=None, color="black", lw=0.9, label="predicted")
    left.set(xlabel="time", title="control")
    for k, color in ((1.0, REFERENCE), (r.k.item(), STATE)):
        path = r.po.optimum(r.problem_of, r.torch.tensor(k, dtype=r.torch.float64), r.u0.detach()).state
        right.plot(*path.T, color=color, label=f"$k = {k:.1f}$")
    right.plot(*r.seen[::4].T, "k.", label="expert")
    right.set(xlabel="$x$", title="$y$ over $x$")
    for ax in (left, right):
        ax.legend(frameon=False)


@drawing
def inverse_problem(r: SimpleNamespace) -> None:
    _, (left, right) = panels(2)
    left.stairs(r.k_true, np.linspace(0, 1, len(r.k) + 1), baseline=None, color=REFERENCE, lw=1.8, label="true")
    left.stairs(r.k, np.linspace(0, 1, len(r.k) + 1), baseline=None, color=STATE, lw=1.8, label="found")
    left.plot(r.rod.h * (r.sensors + 1), 0 * r.sensors, "k^", ms=4, clip_on=False, label="sensors")
    left.set(xlabel="$x$", title="conductivity $k$", ylim=(0, None))
    found = r.problem.unpack(r.result)[0][:, r.sensors]
    right.plot(r.grid.times[1:], found, color=STATE, lw=1)
    right.plot(r.grid.times, r.data, ".", color=REFERENCE, ms=3)
    right.set(xlabel="time", title="temperature at the sensors")
    left.legend(frameon=False)


@drawing
def posterior(r: SimpleNamespace) -> None:
    _, (left, right) = panels(2)
    left.fill_between(r.x, r.p - 2 * r.after, r.p + 2 * r.after, color=STATE, alpha=0.2, lw=0)
    left.plot(r.x, r.draws.T, color=STATE, lw=0.5, alpha=0.6)
    left.plot(r.x, r.p, color=STATE, lw=1.8, label="mean, two deviations, samples")
    left.plot(r.x, r.p_true, color=CONTROL, label="true")
    left.plot(r.h * (r.sensors + 1), np.full(len(r.sensors), -2.0), "k^", ms=4, label="sensors")
    left.set(xlabel="$x$", title="$p = \\log k$", ylim=(-2.1, 2.4))
    left.legend(frameon=False, fontsize=7)
    right.semilogy(range(1, 1 + len(r.posterior.eigenvalues)), r.posterior.eigenvalues, "o", color=STATE)
    right.axhline(1.0, color=REFERENCE, ls=":")
    right.set(xlabel="direction", title="what data say, $\\mu$")


@drawing
def stationary(r: SimpleNamespace) -> None:
    _, (left, right) = panels(2)
    lam = r.problem.fields(r.problem.join(r.result.multiplier, r.result.design))[0][0]
    left.plot(r.x, r.target, "--", color=REFERENCE, label="target $d$")
    left.plot(r.x, r.u[0], color=STATE, label="state $u$")
    right.plot(r.x, lam / r.alpha, "--", color=REFERENCE, label=r"$\lambda / \alpha$")
    right.plot(r.x, r.z, color=CONTROL, label="control $z$")
    for ax in (left, right):
        ax.set_xlabel("$x$")
        ax.legend(frameon=False)


@drawing
def control_bounds(r: SimpleNamespace) -> None:
    free = r.po.solve(r.po.ControlProblem(r.rod, r.objective, r.grid), method="newton")
    without = r.problem.unpack(free)[1]
    largest = float(without.abs().max())
    _, axes = panels(3)
    over_space_time(axes[0], without.reshape(40, -1), "control without bounds", "RdBu_r", largest)
    over_space_time(axes[1], r.z.reshape(40, -1), r"$0 \leq z \leq 2$", "RdBu_r", largest)
    over_space_time(axes[2], r.mu.reshape(40, -1), r"multiplier $\mu$", "RdBu_r", float(r.mu.abs().max()))


@drawing
def control_shapes(r: SimpleNamespace) -> None:
    _, axes = panels(3)
    over_space_time(axes[0], r.u, "state $u$", "viridis")
    over_space_time(axes[1], r.z, "control $z = Eq$", "RdBu_r", float(r.z.abs().max()))
    for j in range(4):
        axes[2].stairs(r.q.reshape(r.blocks, 4)[:, j], np.linspace(0, 1, r.blocks + 1), baseline=None, lw=1.8)
    axes[2].set(xlabel="time", title="four heaters $q$")


@drawing
def state_penalties(r: SimpleNamespace) -> None:
    _, (left, right) = panels(2)
    colors = plt.get_cmap("viridis")([0.1, 0.5, 0.8])
    for gamma, result, color in zip((2, 3, 4), r.results[1:], colors):
        problem = r.problem(1.0)
        u, z, _ = problem.unpack(result)
        left.plot(problem.grid.times, np.r_[0.0, u[:, 0]], color=color, label=rf"$\gamma = 10^{gamma}$")
        right.stairs(z, problem.grid.times, baseline=None, color=color, lw=1.5)
    left.axhline(-0.25, color=REFERENCE, ls=":")
    left.set(xlabel="time", title="state $x$")
    right.set(xlabel="time", title="control $z$")
    left.legend(frameon=False)


@drawing
def navier_stokes(r: SimpleNamespace) -> None:
    _, axes = panels(3, height=3.4)
    mesh, flow = r.skfem.MeshTri().refined(2), r.flow
    pressure = np.r_[0.0, r.u[-1, flow.control_dim :]]
    axes[1].tricontourf(*mesh.p, mesh.t.T, pressure - pressure.mean(), levels=12, cmap="RdBu_r")
    for ax, values, title in ((axes[0], r.velocity[-1], "velocity"), (axes[2], r.z.reshape(10, -1)[-2], "force")):
        ax.triplot(*mesh.p, mesh.t.T, color="0.85", lw=0.5)
        ax.quiver(*flow.points, *values.reshape(2, -1), color=STATE if ax is axes[0] else CONTROL, pivot="middle")
        ax.set_title(title)
    axes[1].set_title("pressure")
    for ax in axes:
        ax.set(aspect="equal", xticks=[0, 1], yticks=[0, 1])


@drawing
def own_optimizer(r: SimpleNamespace) -> None:
    _, (left, right) = panels(2)
    least = min(result.objective for result in r.results.values())
    for (name, result), color in zip(r.results.items(), (CONTROL, STATE)):
        spent, f = result.history["gradients"], np.array(result.history["objective"])
        left.semilogy(spent, np.maximum(f - least, 1e-12), ".-", color=color, label=name)
        right.semilogy(spent, result.history["optimality"], ".-", color=color, label=name)
    left.set(xlabel="gradients", title="value above the least one", ylim=(1e-10, None))
    right.set(xlabel="gradients", title="norm of the gradient")
    right.legend(frameon=False)


@drawing
def multi_stage(r: SimpleNamespace) -> None:
    x = r.torch.cartesian_prod(*(r.torch.linspace(a, b, 81).double() for a, b in r.box))
    _, axes = panels(2)
    for ax, u, title in zip(axes, (r.first, r.second), ("error of the first", "with the second")):
        error = (u(x) - r.exact(x)).view(81, 81).T.numpy()
        image = ax.imshow(error, extent=np.ravel(r.box), origin="lower", aspect="auto", cmap="RdBu")
        ax.figure.colorbar(image, ax=ax)
        ax.set(xlabel="$x$", ylabel="time", title=title)


@drawing
def training_loop(r: SimpleNamespace) -> None:
    torch = r.torch
    _, (left, right) = panels(2, height=3.0)
    side = torch.linspace(-1.2, 1.2, 120)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1).reshape(-1, 2)
    with torch.no_grad():
        share = r.serial(grid).softmax(1)[:, 1].reshape(120, 120)
    left.imshow(share, extent=(-1.2, 1.2, -1.2, 1.2), origin="lower", cmap="RdBu_r", alpha=0.4, vmin=0, vmax=1)
    left.scatter(*r.points.T, c=r.label, cmap="RdBu_r", s=5)
    left.set(xticks=[], yticks=[])
    right.semilogy(r.losses, color=STATE)
    right.set(xlabel="epoch", title="loss")


@drawing
def from_torchbraid(r: SimpleNamespace) -> None:
    nna, nn = r.nna, r.nn
    _, (left, right) = panels(2, height=3.0)
    framed = np.pad(r.images[:12, 0], ((0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    left.imshow(np.hstack([np.vstack(framed[k : k + 3]) for k in (0, 3, 6, 9)]), cmap="gray")
    left.set(xticks=[], yticks=[], title="twelve of the images")
    for relaxation, color in (("F", CONTROL), ("FCF", STATE)):
        errors = []
        for cycles in (1, 2, 3, 4):
            words = {"coarsening": "4", "cycles": cycles, "adjoint_cycles": cycles, "relaxation": relaxation}
            layers = nna.LayerParallel(None, lambda: r.StepLayer(4), 16, 1.0, **words)
            layers.load_state_dict(r.network.parallel_nn.state_dict())
            network = nn.Sequential(r.network.open_nn, layers, r.network.close_nn)
            loss = lambda network=network: nn.functional.cross_entropy(network(r.images), r.labels)  # noqa: E731
            errors.append(nna.layers.measure_bias(network, loss))
        right.semilogy((1, 2, 3, 4), np.maximum(errors, 1e-8), "o-", color=color, label=relaxation)
    right.set(xlabel="cycles, forward and backward", title="relative error of the gradient", xticks=(1, 2, 3, 4))
    right.legend(frameon=False, title="relaxation")


@drawing
def kkt_by_hand(r: SimpleNamespace) -> None:
    indptr, indices, values = r.assembled.getValuesCSR()
    K = r.sp.csr_matrix((np.where(values == 0, 0, 1), indices, indptr))
    K.eliminate_zeros()
    rows, cols = r.operator.layout.pairing()
    _, (left, right) = panels(2, height=3.4)
    left.spy(K, markersize=0.3, color=STATE)
    right.spy(K[rows][:, cols], markersize=0.3, color=STATE)
    for ax, title in ((left, "in the order u, z, lam"), (right, "step by step, as it is factored")):
        ax.set(xticks=[], yticks=[], title=title)


@drawing
def from_pyadjoint(r: SimpleNamespace) -> None:
    u, z, _ = r.problem.unpack(r.together)
    _, (left, right) = panels(2)
    over_space_time(left, u, "state $u$", "viridis")
    over_space_time(right, z.reshape(20, -1), "control $z$", "RdBu_r", float(z.abs().max()))


def over_space_time(ax: Any, rows: Any, title: str, colors: str, largest: float | None = None) -> None:
    """Rows of steps 1..N over space, with a scale of colors, from -largest to largest where that is given."""
    rows = np.asarray(rows)
    limits = {} if largest is None else {"vmin": -largest, "vmax": largest}
    image = ax.imshow(rows.T, extent=(0, 1, 0, 1), origin="lower", aspect="auto", cmap=colors, **limits)
    ax.figure.colorbar(image, ax=ax)
    ax.set(xlabel="time", ylabel="$x$", title=title)


def main(pages: list[str]) -> None:
    """Draw these pages, or all."""
    for name in pages or DRAWINGS:
        names, _ = run_program(RECIPES / f"{name}.md")
        DRAWINGS[name](SimpleNamespace(**names))
        plt.savefig(RECIPES / f"{name}.png", dpi=100)
        plt.close("all")


if __name__ == "__main__":
    main(sys.argv[1:])
