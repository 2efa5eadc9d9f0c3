"""Optimizers of second order by their names, as options choose them."""

from __future__ import annotations

from torch import nn

from nn_adapters.curvature.hessianfree import NATURAL, HessianFree, HessianFreeSettings
from nn_adapters.curvature.kfac import KFAC, KFACSettings
from nn_adapters.curvature.likelihoods import Likelihood
from nn_adapters.curvature.secondorder import SecondOrder
from pdeopt.core.errors import InputError
from pdeopt.core.settings import Section, read
from pdeopt.core.team import Team

#: The optimizers by name, and what each reads: the natural gradient has the settings of Hessian-free optimization, with
#: a prefix and defaults of its own.
SECOND_ORDER: dict[str, tuple[Section, ...]] = {
    "kfac": (Section(KFACSettings),),
    "hessian_free": (Section(HessianFreeSettings),),
    "natural": (Section(HessianFreeSettings, outer="natural_", defaults=NATURAL),),
}


def second_order_settings(name: str) -> KFACSettings | HessianFreeSettings:
    """The settings of an optimizer, from its options.

    Args:
        name: one of `SECOND_ORDER`.

    Raises:
        InputError: another name, or an option that is not legal.
    """
    if name not in SECOND_ORDER:
        raise InputError("optimizer", name, " | ".join(SECOND_ORDER))
    (section,) = SECOND_ORDER[name]
    return read(section.settings, section.outer, **section.defaults)  # type: ignore[return-value]


def second_order(
    name: str, network: nn.Module, likelihood: Likelihood, seed: int = 0, team: Team | None = None
) -> SecondOrder:
    """The optimizer of this name for a network, with the settings of its options.

    Args:
        name: one of `SECOND_ORDER`.
        network, likelihood, seed, team: see `KFAC`.

    Raises:
        InputError: as `second_order_settings`, and what the optimizer refuses.
    """
    settings = second_order_settings(name)
    if isinstance(settings, KFACSettings):
        return KFAC(network, likelihood, settings, seed, team)
    return HessianFree(network, likelihood, settings, seed, team)
