"""Adam on a smooth function, every gradient counted: the usual first thing to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.monitor import History, Reason, Result
from pdeopt.core.settings import Settings, setting
from pdeopt.optimize.descent.minimizer import Minimizer
from pdeopt.optimize.parts.progress import Doubt

#: Steps up in a row, against the slopes at both ends, from which the gradient is taken to be wrong.
RISES = 50


@dataclass(frozen=True)
class AdamSettings(Settings, prefix="adam_"):
    """Adam."""

    lr: float = setting(1e-3, "learning rate", above=0, at_most=1e30)
    beta1: float = setting(0.9, "decay of the mean of the gradients", at_least=0, at_most=1)
    beta2: float = setting(0.999, "decay of the mean of the squared gradients", at_least=0, at_most=1)
    smallest_lr: float = setting(1e-12, "learning rate below which a run that meets no finite values ends", above=0)


class Adam(Minimizer):
    """m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  x <- x - lr m^ / (sqrt(v^) + 1e-8); m^, v^ without bias.

    D. P. Kingma, J. Ba, 2015. A point whose value or gradient is not finite is not taken: the rate is halved and the
    means are set to zero. The result is the best point met, since f may rise from step to step. Where it rises in many
    steps in a row although the slopes at both ends of each say that it falls, the run ends: the gradient is wrong.
    """

    Settings = AdamSettings

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        super().start(x, known)
        self._best = (self.f, self.x)
        self._lr, self.doubt = self.settings.lr, Doubt()
        self._forget()

    def _forget(self) -> None:
        self._mean, self._square, self._steps = torch.zeros_like(self.x), torch.zeros_like(self.x), 0

    def step(self) -> Reason:
        b1, b2 = self.settings.beta1, self.settings.beta2
        while self._lr > self.settings.smallest_lr:
            self._steps += 1
            self._mean = b1 * self._mean + (1.0 - b1) * self.g
            self._square = b2 * self._square + (1.0 - b2) * self.g.square()
            mean, square = self._mean / (1.0 - b1**self._steps), self._square / (1.0 - b2**self._steps)
            x = self.x - self._lr * mean / (square.sqrt() + 1e-8)
            f, g = self.function.value_and_gradient(x)
            if math.isfinite(f) and math.isfinite(self.function.norm(g)):
                self._judge(x - self.x, f, g)
                if self.doubt.count >= RISES:
                    return Reason.DIVERGED_STAGNATION
                self.x, self.f, self.g, self.radius, self.note = x, f, g, self._lr, ""
                self._best = min(self._best, (f, x), key=lambda pair: pair[0])
                return Reason.ITERATING
            self._lr *= 0.5
            self._forget()
        return Reason.DIVERGED_NAN

    def _judge(self, d: Tensor, f: float, g: Tensor) -> None:
        self.doubt.judge(self.f, f, self.function.dot(self.g, d), lambda: self.function.dot(g, d))

    def result(self, reason: Reason, message: str, history: History) -> Result:
        return Result(self._best[1], reason, message, history, value=self._best[0] * self.unit)

    def memory(self) -> dict[str, Any]:
        return super().memory() | {
            "mean": self._mean.clone(),
            "square": self._square.clone(),
            "steps": self._steps,
            "lr": self._lr,
            "best": self._best[1].clone(),
            "best_f": self._best[0],
            "doubt": self.doubt.count,
        }

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self._mean, self._square = memory["mean"].clone(), memory["square"].clone()
        self._steps, self._lr = int(memory["steps"]), float(memory["lr"])
        self._best = (float(memory["best_f"]), memory["best"].clone())
        self.doubt = Doubt(int(memory["doubt"]))
