"""Schwarz preconditioners of conjugate gradients on J'J + lam d: local solves of parts, and a coarse space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.settings import Settings, setting
from pdeopt.optimize.squares.coarse import COARSE_SPACES, Coarse, CoarseBasis, CoarseRows, spectral
from pdeopt.optimize.squares.localparts import LOCAL_SOLVES, PART_ORDERS, LocalParts
from pdeopt.optimize.squares.sharedjacobian import SharedJacobian
from pdeopt.squares.share import Share

#: How J is kept for products.
KEEPING = ("auto", "single", "double", "none")
#: Entries of J up to which it is kept in double precision.
FEW_ENTRIES = 2 * 10**7


@dataclass(frozen=True)
class SchwarzSettings(Settings):
    """Conjugate gradients on a damped system, and what preconditions them."""

    cg_rtol: float = setting(1e-2, "residual of a damped system at which cg ends", above=0, at_most=1)
    cg_it: int = setting(
        100, "steps of cg in a damped system; 1: the preconditioner's step, of the best length", at_least=1
    )
    keep: str = setting(
        "auto",
        f"precision in which cg keeps J, where it fits; auto: double up to {FEW_ENTRIES:.0e} entries, else single; "
        "none: products by sweeps",
        choices=KEEPING,
    )
    coarse: str = setting(
        "rows",
        "coarse space of cg: gradients of some rows; vectors near the leading eigenvectors of J'J; the gradient in "
        "each part",
        choices=COARSE_SPACES,
    )
    coarse_size: int = setting(400, "rows or vectors of the coarse space", at_least=1)
    local: str = setting(
        "none",
        "local solves of parts in cg: all at once, or one after the other; both need J that is kept",
        choices=LOCAL_SOLVES,
    )
    part_size: int = setting(500, "unknowns of a part", at_least=1)
    part_order: str = setting(
        "neighbors", "unknowns of a part: neighbors, as in a layer, or random", choices=PART_ORDERS
    )


class Schwarz:
    """M^-1 for M near J'J + lam d: a coarse space, local solves, or both.

    Additive: the sum of both. Multiplicative: the local parts one after the other, between two coarse solves,

        M^-1 = C + (1 - C A) L (1 - A C),    A = J'J + lam d,

    which is positive definite for any such C and L (J. Mandel, Balancing domain decomposition, Commun. Numer. Methods
    Eng. 9, 1993). With local solves alone it is one-level Schwarz; parts do not overlap.

    Args:
        coarse: or None.
        local: or None.
        J, d: for the products with A between the two.
        is_multiplicative: how they are put together.
    """

    def __init__(
        self,
        coarse: Coarse | None,
        local: LocalParts | None,
        J: SharedJacobian | None,
        d: float,
        is_multiplicative: bool,
    ) -> None:
        self.coarse, self.local, self.J, self.d = coarse, local, J, d
        self.is_multiplicative, self.lam = is_multiplicative, 0.0

    @property
    def multiplications(self) -> float:
        """Of dense matrices so far."""
        return sum(part.multiplications for part in (self.coarse, self.local) if part is not None)

    def set_damping(self, lam: float) -> None:
        """Prepare for this lam > 0. Collective."""
        self.lam = lam
        for part in (self.coarse, self.local):
            if part is not None:
                part.set_damping(lam)

    def solve(self, s: Tensor) -> Tensor:
        """M^-1 s, of this rank's unknowns. Collective."""
        C, L = self.coarse, self.local
        if L is None:
            return s / (self.lam * self.d) if C is None else C.solve(s)
        if C is None:
            return L.sweep(s) if self.is_multiplicative else L.solve(s)
        if not self.is_multiplicative:
            assert isinstance(C, CoarseBasis)
            return L.solve(s) + C.solve_within(s)
        y = C.solve(s)
        z = L.sweep(s - self._product(y))
        return y + z - C.solve(self._product(z))

    def _product(self, d: Tensor) -> Tensor:
        """A d."""
        assert self.J is not None
        return self.J.backward_own(self.J.forward_own(d)) + self.lam * self.d * d


def schwarz(
    settings: SchwarzSettings, J: SharedJacobian | None, rows: Tensor | None, m: int, g: Tensor, d: float
) -> Schwarz | None:
    """What the settings ask for; None for conjugate gradients alone. Collective.

    Args:
        settings: which.
        J: the Jacobian where it is kept.
        rows: those of the coarse space, this rank's columns of them, (k, own); None where it is of another kind.
        m: rows of J.
        g: a gradient, (n,).
        d: mean diagonal of J'J.

    Raises:
        InputError: local solves, or vectors of the coarse space, without J.
    """
    s, needs = settings, settings.local != "none" or settings.coarse in ("spectral", "parts")
    if J is None and needs:
        legal = "-lm_coarse rows | none with -lm_local none; or a J that is kept, in single precision or on more ranks"
        raise InputError("-lm_local and -lm_coarse", f"{s.local} and {s.coarse}, without J", legal)
    if s.local == "additive" and s.coarse == "rows":
        legal = "multiplicative; or -lm_coarse spectral | parts | none"
        raise InputError("-lm_local", "additive, with -lm_coarse rows", legal)
    local = LocalParts(J, s.part_size, s.part_order, d) if J is not None and s.local != "none" else None
    coarse: Coarse | None = None
    if rows is not None:
        coarse = CoarseRows(rows, m, d, Share(None, len(g)) if J is None else J.columns)
    elif J is not None and s.coarse == "spectral":
        coarse = CoarseBasis(J, spectral(J, min(s.coarse_size, m, len(g))), d, True)
    elif J is not None and s.coarse == "parts":
        coarse = CoarseBasis(J, _by_parts(J, s, g), d, False)
    is_multiplicative = s.local == "multiplicative"
    return None if coarse is None and local is None else Schwarz(coarse, local, J, d, is_multiplicative)


def _by_parts(J: SharedJacobian, settings: SchwarzSettings, g: Tensor) -> Tensor:
    """The gradient in each of up to `coarse_size` parts of neighboring unknowns, zero elsewhere, (own, k)."""
    size = max(settings.part_size, -(-len(g) // settings.coarse_size))
    own = torch.arange(J.columns.own.start, J.columns.own.stop)
    vectors = torch.zeros(len(own), -(-len(g) // size), dtype=torch.float64)
    vectors[torch.arange(len(own)), own // size] = g[J.columns.own]
    return vectors
