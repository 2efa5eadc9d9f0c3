"""Settings of the scripts `problems.pinn_*`: the optimizer, the network and its points, and what `auto` stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import nn_adapters as nna
import pdeopt as po
from pdeopt.core import require_memory
from pdeopt.core.memory import DOUBLE
from pdeopt.optimize.descent import Adam
from problems.shared.equation import Equation
from problems.shared.optimizers import Optimizers

#: Gradients of a run, unless the options say otherwise.
MAX_GRADIENTS = 5000

#: Of SPQN: dense matrices, and one sweep of local solves, at the start; see docs/benchmarks.md for what they are worth.
SPQN_DEFAULTS = {"method": "ssbroyden", "type": "multiplicative", "local": "ssbroyden", "local_it": 10, "every": 10**9}


#: Of Levenberg-Marquardt: points drawn anew every few iterations.
LM_DEFAULTS = {"resample_every": 6, "candidates": 30_000}

#: Unknowns up to which `auto` is Levenberg-Marquardt: J'J then costs as much as some ten gradients.
MOST_UNKNOWNS = 5000


def optimizers(parts: int) -> Optimizers:
    """The optimizers that are offered, with this many parts for SPQN."""
    return Optimizers(
        {
            "lbfgs": (po.LBFGS, {}),
            "ssbroyden": (po.SSBroyden, {}),
            "spqn": (po.SPQN, {**SPQN_DEFAULTS, "parts": parts}),
            "tr": (po.TrustRegionMinimizer, {}),
            "adam": (Adam, {}),
            "lm": (po.LevenbergMarquardt, LM_DEFAULTS),
        },
        stop={"max_it": 10**9, "gtol": 1e-14, "max_gradients": MAX_GRADIENTS},
    )


#: Optimizers that begin on fewer points, unless the options say otherwise.
LEVELED = ("ssbroyden", "spqn")

#: Optimizers whose work the ranks share: rows of least squares, local solves.
SHARED = ("lm", "spqn")

OPTIMIZERS = tuple(optimizers(1))


@dataclass(frozen=True)
class PinnSettings(po.Settings):
    """The network, its points, and how it is trained."""

    optimizer: str = po.setting(
        "auto", f"optimizer; auto: lm up to {MOST_UNKNOWNS} unknowns, else ssbroyden", choices=("auto", *OPTIMIZERS)
    )
    max_cpu_seconds: float = po.setting(
        60.0, "seconds of the processor at most, measurements of the error not counted; 0 for no limit", at_least=0
    )
    max_gradients: int = po.setting(
        MAX_GRADIENTS,
        "gradients or Jacobians at most, of parts too; 0 for no limit; -opt_max_gradients wins",
        at_least=0,
    )
    target_error: float = po.setting(0.0, "relative error at which to stop", at_least=0)
    points: int = po.setting(
        10_000, "points where the equation is to hold, and at which the loss is told; lm draws its own", at_least=1
    )
    sampler: str = po.setting("hammersley", "how points are drawn", choices=tuple(nna.POINT_SAMPLERS))
    resample_every: float = po.setting(
        0.0,
        "work from one drawing of new points, where the residual is large, to the next; 0: never; of lm: "
        "-lm_resample_every",
        at_least=0,
    )
    resample_power: float = po.setting(1.0, "k of the density |r|^k / mean + c of new points", at_least=0)
    resample_floor: float = po.setting(1.0, "c of the density |r|^k / mean + c of new points", at_least=0)
    layers: int = po.setting(0, "hidden layers; 0: as published, with lm three or four", at_least=0)
    width: int = po.setting(0, "neurons of a hidden layer; 0: as published, with lm 20 or 24", at_least=0)
    body: str = po.setting(
        "auto", "plain layers, or residual ones; auto: resnet, with lm mlp", choices=("auto", *nna.NETWORK_BODIES)
    )
    features: str = po.setting(
        "auto",
        "what the network takes in: x itself; sin and cos of it for a periodic solution, its square for an even one, "
        "the singular functions of a corner; waves: larger ones, for activation sin; auto: with lm, and where there is "
        "no other, the latter",
        choices=("auto", "plain", "periodic", "even", "corner", "waves"),
    )
    activation: str = po.setting(
        "auto",
        "activation of the hidden layers; auto: tanh, with lm and for waves sin",
        choices=("auto", *nna.ACTIVATION_NAMES),
    )
    adaptive: bool = po.setting(
        None, "learn a slope of the activation in each layer; default: yes, with lm no", kind=bool
    )
    slope_scale: float = po.setting(1.0, "n of the activation act(n slope z)", above=0)
    device: str = po.setting("cpu", "where points are evaluated, as PyTorch has it: cpu, cuda, cuda:1, ...")
    point_levels: int = po.setting(
        0,
        "levels of points, each half of the next, for quasi-Newton methods to begin on; 1: "
        "all points alone; 0: 3 for ssbroyden and spqn, 1 for the others",
        at_least=0,
    )
    seed: int = po.setting(0, "seed of all random numbers", at_least=0)
    error_every: float = po.setting(100.0, "work from one measurement of the error to the next", above=0)


def chosen(equation: Equation, settings: PinnSettings) -> PinnSettings:
    """The settings with the optimizer, the network and the features that `auto` and 0 stand for."""
    s = settings
    layers, width = s.layers or equation.small[0], s.width or equation.small[1]
    unknowns = nna.Network(len(equation.names) + 1, (width,) * layers).size
    optimizer = s.optimizer if s.optimizer != "auto" else "lm" if unknowns <= MOST_UNKNOWNS else "ssbroyden"
    is_lm = optimizer == "lm"
    if not is_lm:
        layers, width = s.layers or equation.layers, s.width or equation.width
    if is_lm and s.resample_every:
        raise po.InputError("-resample_every", f"{s.resample_every:g}, with lm", "-lm_resample_every ITERATIONS")
    form = list(equation.forms)[-1 if is_lm else 0]
    features = form if s.features == "auto" else s.features
    if features not in equation.forms:
        raise po.InputError("-features", f"{features}, for {equation.name}", " | ".join(equation.forms))
    body = s.body if s.body != "auto" else "mlp" if is_lm else "resnet"
    adaptive = not is_lm if s.adaptive is None else s.adaptive
    activation = s.activation
    if activation == "auto":
        activation = equation.small_activation if features == list(equation.forms)[-1] else "tanh"
    found = {"optimizer": optimizer, "layers": layers, "width": width, "features": features, "body": body}
    return replace(s, **found, adaptive=adaptive, activation=activation)


def require_room(equation: Equation, settings: PinnSettings) -> None:
    """Refuse sizes that cannot fit: weights, and at each point all layers with their derivatives by the inputs."""
    layers, width = settings.layers, settings.width
    derivatives = 1 + len(equation.derivatives)
    given = f"{settings.points} and {layers} layers of width {width}"
    needed = DOUBLE * layers * width * (settings.points * derivatives + width)
    require_memory(needed, "-points, -layers, -width", given, "smaller ones")
    if settings.point_levels > settings.points.bit_length():
        legal = f"at most {settings.points.bit_length()}: each has half the points of the next"
        raise po.InputError("-point_levels", settings.point_levels, legal)
