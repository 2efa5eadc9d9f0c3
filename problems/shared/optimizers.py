"""The optimizers that a script offers by name, with the defaults that it gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pdeopt as po
from pdeopt.core import Section, sections
from pdeopt.optimize.descent import Minimizer, StopSettings

#: Choices that lead to a group of options: pairs (option, value).
Path = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Optimizers:
    """Optimizers by their names in `-optimizer`.

    Attributes:
        methods: the class of each, and settings that replace its defaults.
        stop: settings that replace the defaults of when to stop, for all of them; None for what a run finds out.
    """

    methods: Mapping[str, tuple[type[Minimizer], Mapping[str, Any]]]
    stop: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.methods)

    def options(self, default: str) -> list[Section]:
        """What a script reads whose default is this optimizer."""
        found = [Section(StopSettings, defaults=self.stop)]
        for name, (kind, own) in self.methods.items():
            found += under(() if name == default else (("optimizer", name),), method_options(kind, **own))
        return found

    def make(
        self, name: str, function: po.SmoothFunction | None = None, team: Any = None, **defaults: Any
    ) -> Minimizer:
        """The optimizer of this name on a function.

        Args:
            name: of the optimizer.
            function: a `SmoothFunction` to be minimized; None for settings alone.
            team: ranks that share its work, where the optimizer can share it.
            **defaults: settings that replace the script's defaults, those that the optimizer has; options win.
        """
        kind, own = self.methods[name]
        known = {each.name for cls in (kind.Settings, StopSettings) for each in fields(cls)}
        given = {key: value for key, value in defaults.items() if key in known}
        shared = {"team": team} if team is not None and kind in SHARING else {}
        words = {key: value for key, value in {**self.stop, **own, **given}.items() if value is not None}
        return kind(function, **words, **shared)


#: Optimizers whose work a team of ranks shares.
SHARING = (po.SPQN, po.APTS, po.TrustRegionMinimizer, po.LevenbergMarquardt)


def method_options(kind: type[Minimizer], **defaults: Any) -> list[Section]:
    """What an optimizer reads, but when to stop, which is stated once for all of them."""
    return [section for section in sections(kind.Settings, **defaults) if section.settings is not StopSettings]


def under(path: Path, found: Iterable[Section]) -> list[Section]:
    """Sections that are read where the choices of a path are made."""
    return [replace(section, when=tuple(path + way for way in section.when)) for section in found]
