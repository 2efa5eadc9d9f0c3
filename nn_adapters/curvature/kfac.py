"""K-FAC: steps of a network by Kronecker-factored curvature, with step length, momentum and damping of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.curvature.factors import FISHER, KroneckerFactors
from nn_adapters.curvature.likelihoods import Likelihood
from nn_adapters.curvature.secondorder import Before, SecondOrder, chosen
from pdeopt.core.messages import PRECISIONS
from pdeopt.core.monitor import logged
from pdeopt.core.settings import Settings, setting
from pdeopt.core.team import Team
from pdeopt.lowrank.kronecker import KroneckerBlocks

#: A batch whose loss is so many times that of the batch before asks whether the step between them has failed; it has,
#: and is taken back, where the step made the loss of this batch so many times larger and the model did not foresee it.
RISEN, FAILED = 1.5, 2.0

#: A step that makes the loss of its own batch so many times larger is refused: more damping, at most so many times.
MUCH, TRIES = 1.05, 6

#: Legal factors of d and of the last step where the quadratic model chooses: what a small batch, or one that is all
#: but fitted, says of longer steps is mostly noise.
LONGEST, MOMENTUM = 1.0, (0.0, 0.9)


@dataclass(frozen=True)
class KFACSettings(Settings, prefix="kfac_"):
    """K-FAC."""

    fisher: str = setting("sampled", "targets of the factors G", choices=FISHER)
    average: float = setting(0.95, "factor of the weights of older batches in the factors", at_least=0, at_most=1)
    statistics_every: int = setting(1, "steps from one batch that is taken into the factors to the next", at_least=1)
    statistics_samples: int = setting(
        1024, "samples of a batch at most that go into the factors; 0 for all", at_least=0
    )
    model_samples: int = setting(2048, "samples of a batch at most in the quadratic model; 0 for all", at_least=0)
    inverse_every: int = setting(5, "steps from one inversion of the factors to the next", at_least=1)
    damping: float = setting(3e-3, "first damping", above=0)
    least: float = setting(1e-3, "damping at least", above=0)
    judge_every: int = setting(5, "steps from one adaptation of the damping to the next; 0 for none", at_least=0)
    change: float = setting(
        0.75, "factor of the damping after a good step; a poor one divides by it", above=0, at_most=1
    )
    l2: float = setting(0.0, "weight of |theta|^2 / 2 in the loss", at_least=0)
    decay: float = setting(
        0.0, "share of the weights, without biases and normalizations, that a step takes away", at_least=0, at_most=1
    )
    messages: str = setting("float32", "precision of the factors' sums between ranks", choices=tuple(PRECISIONS))
    late: int = setting(
        0, "batches whose factors' sums may still be under way when the factors are inverted", at_least=0
    )
    rate: float = setting(None, "learning rate; by default that of the quadratic model", above=0, kind=float)
    momentum: float = setting(0.9, "factor of the last step (with -kfac_rate)", at_least=0, at_most=1)


class KFAC(SecondOrder):
    """An optimizer of PyTorch whose metric is the Kronecker-factored Fisher matrix; no learning rate is needed.

    A step is alpha d + mu s, d = -P^-1 g the natural gradient by P = diag(G (x) A) + damping, s the last step. alpha
    and mu minimize the quadratic model g.x + x.(F + damping)x / 2 with the exact Fisher matrix F of the batch, which
    takes forward derivatives of the network along d and s alone (J. Martens, R. Grosse, ICML 2015, section 7). They are
    kept in alpha <= 1 and 0 <= mu <= 0.9. P is an average over batches; it is inverted every few steps.

    The damping follows Levenberg and Marquardt's rule, judged on another batch: after a step s from theta, the next
    batch B compares the curvature of its loss, 2 (f_B(theta + s) - f_B(theta) - g_B.s), with the model's
    s.(F_B + damping)s. The ratio rho = 2 - (the former / the latter) is what a batch finds for its own step, without
    the luck of having chosen it: above 3/4 the damping falls, not below a floor, and below 1/4 it grows. A step that
    doubles the loss of B against the model is taken back.

    Args:
        network: of Linear, Conv2d and normalization layers, of what has no parameters of its own, and of one
            `LayerParallel` of such layers, each of which has its factors on the rank that owns it. The arguments of its
            calls in training mode are the batch. Nothing random, as dropout is.
        likelihood: of its loss, see `CrossEntropy`, `SquaredError`.
        settings: keywords replace single ones: `KFAC(network, CrossEntropy(), damping=1e-2)`.
        seed: of sampled targets, which are drawn by each rank for its samples.
        team: ranks that share a batch: the closure has the samples of this rank, and the mean is over all of them. All
            start with the same parameters, which stay equal to the last bit. A layer belongs to one rank, which has its
            factors and inverses, preconditions its part of the gradient, and sends the step to all: what is sent is
            less than an allreduce of gradient and factors takes. `step` is then collective.

    Attributes:
        damping, ratio: now, and the last rho.
        coefficients: alpha and mu of the last step.
        taken_back, refused: steps so far.
        steps: so far.

    Raises:
        InputError: settings that are not legal, settings and keywords at once, a layer without a block of curvature.

    Example:
        >>> loss = nna.CrossEntropy()
        >>> optimizer = nna.KFAC(network, loss)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     value = loss(network(x), labels)
        ...     value.backward()
        ...     return value
        >>> optimizer.step(closure)
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        settings: KFACSettings | None = None,
        seed: int = 0,
        team: Team | None = None,
        **words: Any,
    ) -> None:
        self.settings: KFACSettings = chosen(KFACSettings, settings, words)
        super().__init__(network, likelihood, self.settings.l2, self.settings.decay, seed, team)
        own = self.settings
        self.factors = KroneckerFactors(
            self.model.serial, self.model.layers, likelihood, own.fisher, self.generator, team, own.messages, own.late
        )
        self.damping, self.ratio, self.coefficients = self.settings.damping, math.nan, (1.0, 0.0)
        self.inverse = KroneckerBlocks([], [])
        self.last: Tensor | None = None
        self.loss, self.taken_back, self.refused = math.inf, 0, 0

    def advance(self, loss: float, g: Tensor) -> Tensor:
        own = self.settings
        if self.can_try and self.last is not None and self._is_due(loss):
            g = self._judge(loss, g, self.before(own.model_samples))
        if self.steps % own.statistics_every == 0:
            some = self.model.some(own.statistics_samples)
            self.factors.average(*some, own.average, whole=self.model.samples)
        if self.steps % own.inverse_every == 0 or self.last is None:
            self._invert()
        step = self._step(g)
        for _ in range(TRIES if own.rate is None else 0):
            if not self._raises(step):
                break
            self.damping *= 4.0
            self.refused += 1
            self._invert()
            step = self._step(g)
        self.last, self.loss = step, loss
        return step

    @logged("pdeoptNetInverses")
    def _invert(self) -> None:
        def inverse() -> KroneckerBlocks:
            return self.factors.blocks().inverse(self.damping + self.settings.l2)

        self.inverse = self.together(inverse)

    def _step(self, g: Tensor) -> Tensor:
        """alpha d + mu s."""
        d, own = -self.factors.precondition(self.inverse, g), self.settings
        by_rate = None if own.rate is None else (self.course * own.rate, own.momentum)
        self.coefficients = by_rate or self._minimizer(d, g)
        alpha, mu = self.coefficients
        return alpha * d if self.last is None else alpha * d + mu * self.last

    @logged("pdeoptNetCheck")
    def _raises(self, step: Tensor) -> bool:
        """Whether the loss of the batch itself, which the model lets fall, rises much by a step."""
        before, after = self.model.losses(step, self.settings.model_samples)
        return after > MUCH * before or (math.isfinite(before) and not math.isfinite(after))

    @logged("pdeoptNetModel")
    def _minimizer(self, d: Tensor, g: Tensor) -> tuple[float, float]:
        """alpha and mu of the quadratic model."""
        directions = [d] if self.last is None else [d, self.last]
        return minimizer(*self.model.quadratic(directions, g, self.damping, self.settings.model_samples))

    def _is_due(self, loss: float) -> bool:
        """Whether to look at the last step: now and then, and where the loss has risen beyond chance."""
        every = self.settings.judge_every
        return every > 0 and (self.steps % every == 0 or loss > RISEN * self.loss)

    def _judge(self, loss: float, g: Tensor, before: Before) -> Tensor:
        """Adapt the damping, and take the last step back where it was a failure; the gradient where we are then."""
        assert self.last is not None
        model = before.curvature + self.damping * self.model.square(self.last)
        risen = loss - before.loss - before.slope
        self.ratio = 2.0 - 2.0 * risen / model if model > 0.0 else math.nan
        if self.ratio > 0.75:
            self.damping = max(self.damping * self.settings.change, self.settings.least)
        elif not self.ratio >= 0.25:
            self.damping /= self.settings.change
        if self.ratio >= 0.25 or not loss > FAILED * before.loss:
            return g
        self.model.move(-self.last)
        self.last, self.loss = None, before.loss
        self.damping *= 4.0
        self.taken_back += 1
        return before.gradient

    def memory(self) -> dict[str, Any]:
        chosen = torch.tensor(self.coefficients, dtype=torch.float64)
        numbers = {"damping": self.damping, "coefficients": chosen, "taken_back": self.taken_back}
        numbers |= {"refused": self.refused}
        numbers |= {name: each for name, each in (("ratio", self.ratio), ("loss", self.loss)) if math.isfinite(each)}
        last = {} if self.last is None else {"last": self.last.clone()}
        factors = {"A": self.inverse.A, "G": self.inverse.G}
        inverse = {f"inverse.{kind}{k}": each for kind in "AG" for k, each in zip(self.factors.sums, factors[kind])}
        return super().memory() | numbers | last | inverse | self.factors.memory()

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self.damping, self.ratio = float(memory["damping"]), float(memory.get("ratio", math.nan))
        self.loss, self.taken_back = float(memory.get("loss", math.inf)), int(memory["taken_back"])
        self.refused = int(memory["refused"])
        alpha, mu = memory["coefficients"].tolist()
        self.coefficients = alpha, mu
        self.last = memory["last"].clone() if "last" in memory else None
        own = [k for k in self.factors.sums if f"inverse.A{k}" in memory]
        A, G = ([memory[f"inverse.{kind}{k}"].clone() for k in own] for kind in "AG")
        self.inverse = KroneckerBlocks(A, G)
        self.factors.recall(memory)


def minimizer(b: Tensor, Q: Tensor) -> tuple[float, float]:
    """(alpha, mu) with least b.c + c.Qc / 2, within `LONGEST` and `MOMENTUM`; mu = 0 where there is no last step.

    Args:
        b, Q: (n,) and (n, n), n = 1 or 2, float64; Q >= 0.
    """
    first, slope = float(Q[0, 0]), float(b[0])
    if not first > 0.0:
        return 0.0, 0.0
    if len(b) == 1:
        return min(-slope / first, LONGEST), 0.0
    cross = float(Q[0, 1])
    rest = float(Q[1, 1]) - cross**2 / first
    wanted = -(float(b[1]) - cross * slope / first) / rest if rest > 1e-12 * float(Q[1, 1]) else 0.0
    mu = min(max(wanted, MOMENTUM[0]), MOMENTUM[1])
    return min(-(slope + mu * cross) / first, LONGEST), mu
