"""Settings: dataclasses whose values come from options, checked, with the help that -help prints.

A group of options is a frozen dataclass that inherits `Settings`. It states its prefix, its fields state help, default
and legal values, and a field that chooses states which other groups each choice reads. An underscore at the end of a
field's name, as of `lambda_`, is not a part of the option's::

    @dataclass(frozen=True)
    class WathenSettings(Settings, prefix="wathen_"):
        "Block factorization with an approximate Schur complement."

        schur: str = setting("matched", "approximation of the Schur complement", choices=("matched", "exact"))
        propagator: str = setting("serial", "inverse of the state Jacobian", choices=("serial", "mgrit"),
                                  reads={"mgrit": (LinearMgritSettings,)})

`read(WathenSettings)` fills it from `-wathen_schur` and `-wathen_propagator`. `sections` follows what is read, and
under which choice; -help, the documentation and the tests of the options all come from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from petsc4py import PETSc

from pdeopt.core.errors import InputError
from pdeopt.core.options import INTEGER, REAL, remember, warn_if_not_read

T = TypeVar("T", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Base of all groups of options.

    A subclass is a frozen dataclass; all its fields are made by `setting`. The first line of its docstring is the title
    of the group in -help.

    Class arguments:
        prefix: of the options, `"wathen_"` for `-wathen_schur`; default none.
        includes: groups that are read wherever this one is, whatever its values; default none. A class stands for a
            group that is read without an outer prefix; see `Section` for the others.

    Raises:
        InputError: `read` and `check`, for a value that is not legal; the message names what was got and what is legal.
    """

    prefix: ClassVar[str] = ""
    includes: ClassVar[tuple[type[Settings] | Section, ...]] = ()

    def __init_subclass__(
        cls, prefix: str = "", includes: tuple[type[Settings] | Section, ...] = (), **rest: Any
    ) -> None:
        super().__init_subclass__(**rest)
        cls.prefix, cls.includes = prefix, includes

    @classmethod
    def title(cls) -> str:
        """The first line of the docstring, without its full stop."""
        return (cls.__doc__ or cls.__name__).strip().split("\n")[0].rstrip(".")


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    kind: type | None = None,
    reads: Mapping[str, tuple[type[Settings] | Section, ...]] | None = None,
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: its value without an option; None or "" for nothing.
        help: one line that can be read without the option's name.
        choices: the legal words.
        at_least, above, at_most: limits of a number.
        kind: its type where the default is None.
        reads: the groups of options that a choice reads, by choice; as `includes` of `Settings`.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "kind": kind or type(default),
        "reads": dict(reads or {}),
    }
    return field(default=default, metadata=metadata)


def read(cls: type[T], outer: str = "", **defaults: Any) -> T:
    """The settings that the options `-{outer}{prefix}{name}` give.

    Args:
        cls: the group.
        outer: a prefix before the group's own, as that of a solver inside another one.
        defaults: values that replace the defaults of the class; options win.

    Returns:
        a new object of the class, all its values checked.

    Raises:
        InputError: a value that is not legal, or a default that the group does not have.
    """
    names = [each.name for each in dataclasses.fields(cls)]
    if unknown := sorted(set(defaults) - set(names)):
        raise InputError(f"{cls.__name__}: setting", ", ".join(unknown), ", ".join(names))
    prefix = outer + cls.prefix
    database = PETSc.Options(prefix)
    values: dict[str, Any] = {}
    for each in dataclasses.fields(cls):
        word = option_of(each)
        name = prefix + word
        remember(name)
        warn_if_not_read(name)
        text = database.getString(word, None) if database.hasName(word) else None
        values[each.name] = defaults.get(each.name, each.default) if text is None else _convert(name, each, text)
        _check("-" + name, each, values[each.name])
    return cls(**values)


def read_inner(cls: type[T], outer: str, **defaults: Any) -> T:
    """As `read`; where `-{outer}{prefix}{name}` is not given, `-{prefix}{name}` is asked.

    For solvers inside others, so that -wathen_schur serves every Wathen preconditioner of a run.
    """
    return read(cls, outer, **vars(read(cls, **defaults))) if outer else read(cls, **defaults)


def check(settings: Settings) -> None:
    """Make sure that settings made by hand, and not by `read`, are legal.

    Args:
        settings: a group of options.

    Raises:
        InputError: a value that is not legal; the message names the field, what was got and what is legal.
    """
    for each in dataclasses.fields(settings):
        _check(each.name, each, getattr(settings, each.name))


def option_of(each: dataclasses.Field[Any]) -> str:
    """The name of a field's option, without the prefix."""
    return each.name.removesuffix("_")


# -- help --------------------------------------------------------------------------------------------------

#: Choices, (option, value), all of which must hold.
Path = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """A group of options as -help shows it; also what `reads` and `includes` hold where a class does not say enough.

    Attributes:
        settings: the group.
        outer: prefix before the group's own.
        when: the choices that make a run read it; one of the paths must hold. A run with the defaults reads the group
            where a path is empty.
        defaults: those of the reader, where they differ from the group's.
    """

    settings: type[Settings]
    outer: str = ""
    when: tuple[Path, ...] = ((),)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Names without dash, and defaults."""
        prefix = self.outer + self.settings.prefix
        return {
            prefix + option_of(each): self.defaults.get(each.name, each.default)
            for each in dataclasses.fields(self.settings)
        }

    def text(self) -> str:
        """The title, when the group is read, and a line an option."""
        paths = [" ".join(f"-{option} {value}" for option, value in path) for path in _joined(self.when)]
        read_with = "" if "" in paths else f" (with {', or '.join(paths)})"
        lines = [f"{self.settings.title()}{read_with}:"]
        for each, (name, default) in zip(dataclasses.fields(self.settings), self.options.items()):
            remember(name)
            shown = "" if default in ("", None) else f" <{_word(default)}>"
            lines.append(f"  -{name}{shown}: {each.metadata['help']} ({_legal(each)})")
        return "\n".join(lines)


def sections(cls: type[Settings], outer: str = "", **defaults: Any) -> list[Section]:
    """The group, and all groups that are read with it or under one of its choices, each once.

    Args:
        cls, outer, defaults: as for `read`.
    """
    first = Section(cls, outer, defaults=defaults)
    return merge([first, *_below(first, frozenset({cls}))])


def merge(found: Sequence[Section]) -> list[Section]:
    """Each group of options once, with all the choices that read it; the first has the defaults."""
    merged: dict[tuple[type[Settings], str], Section] = {}
    for each in found:
        first = merged.setdefault((each.settings, each.outer), each)
        paths = _shortest((*first.when, *each.when))
        merged[each.settings, each.outer] = dataclasses.replace(first, when=paths)
    return list(merged.values())


def _below(above: Section, seen: frozenset[type[Settings]]) -> Iterator[Section]:
    """The groups below one; a group that contains itself, as nested solvers do, is not followed again."""
    (path,) = above.when
    followed: list[tuple[type[Settings] | Section, Path]] = [(part, path) for part in above.settings.includes]
    for each, (option, chosen) in zip(dataclasses.fields(above.settings), above.options.items()):
        for choice, groups in each.metadata["reads"].items():
            followed += [(group, path if choice == chosen else (*path, (option, choice))) for group in groups]
    for group, way in followed:
        if isinstance(group, Section):
            section = dataclasses.replace(group, outer=above.outer + group.outer, when=(way,))
        else:
            section = Section(group, when=(way,))
        if section.settings not in seen:
            yield section
            yield from _below(section, seen | {section.settings})


def _shortest(paths: Sequence[Path]) -> tuple[Path, ...]:
    """The paths without those that ask for more than another one does."""
    return tuple(path for path in dict.fromkeys(paths) if not any(set(other) < set(path) for other in paths))


def _joined(paths: Sequence[Path]) -> Sequence[Path]:
    """Paths that differ in one value only, as one path with the value "this | that"."""
    found: list[Path] = []
    for path in paths:
        for place, other in enumerate(found):
            differ = [i for i, (a, b) in enumerate(zip(other, path)) if a != b]
            if len(other) == len(path) and len(differ) == 1 and other[differ[0]][0] == path[differ[0]][0]:
                i = differ[0]
                found[place] = (*path[:i], (path[i][0], f"{other[i][1]} | {path[i][1]}"), *path[i + 1 :])
                break
        else:
            found.append(path)
    return found if len(found) == len(paths) else _joined(found)


# -- values ------------------------------------------------------------------------------------------------

_FLAGS = dict.fromkeys(("", "1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


#: Digits from where a number does not fit into 64 bits.
_DIGITS = 19


def _convert(name: str, each: Any, text: str) -> Any:
    kind = each.metadata["kind"]
    if kind is bool and text.lower() in _FLAGS:
        return _FLAGS[text.lower()]
    if kind is int and INTEGER.fullmatch(text) and len(text) < _DIGITS:
        return int(text)
    if kind is float and REAL.fullmatch(text):
        return float(text)
    if kind is str and text:
        return text
    digits = f", of at most {_DIGITS - 1} digits" if kind is int and INTEGER.fullmatch(text) else ""
    raise InputError(f"-{name}", repr(text) if text else "nothing", _legal(each) + digits)


def _check(name: str, each: Any, value: Any) -> None:
    limits = each.metadata
    if value is None and each.default is None:
        return
    fits = isinstance(value, (int, float) if limits["kind"] is float else limits["kind"])
    legal = fits and (
        (limits["choices"] is None or value in limits["choices"])
        and (limits["at_least"] is None or value >= limits["at_least"])
        and (limits["above"] is None or value > limits["above"])
        and (limits["at_most"] is None or value <= limits["at_most"])
        and not (isinstance(value, float) and not math.isfinite(value))
    )
    if not legal:
        raise InputError(name, repr(value), _legal(each))


def _legal(each: Any) -> str:
    limits = each.metadata
    if limits["choices"] is not None:
        return " | ".join(limits["choices"])
    words = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text"}
    signs = {">=": limits["at_least"], ">": limits["above"], "<=": limits["at_most"]}
    bounds = " and ".join(f"{sign} {limit}" for sign, limit in signs.items() if limit is not None)
    return f"{words[limits['kind']]} {bounds}".rstrip()


def _word(value: Any) -> str:
    """A value as it is written on a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
