from dataclasses import dataclass

import pytest
from petsc4py import PETSc

from pdeopt.core.errors import InputError
from pdeopt.core.options import require_all_read, set_default, unread
from pdeopt.core.settings import Section, Settings, check, read, read_inner, sections, setting


@dataclass(frozen=True)
class Some(Settings, prefix="t_"):
    """A group of options.

    More of it.
    """

    number: int = setting(3, "a number", at_least=2, at_most=9)
    size: float = setting(0.5, "a size", above=0)
    word: str = setting("one", "a word", choices=("one", "two"))
    flag: bool = setting(False, "a flag")
    maybe: float = setting(None, "a bound", kind=float)


def test_no_options_are_the_defaults():
    assert read(Some) == Some()
    assert read(Some, number=5) == Some(number=5)


def test_options_of_the_prefix_win(options):
    options(t_number=4, t_size="1e-3", t_word="two", t_flag="", t_maybe=-1, number=9)
    assert read(Some, number=5) == Some(4, 1e-3, "two", True, -1.0)


@pytest.mark.parametrize("text, value", [("1", True), ("yes", True), ("off", False), ("False", False)])
def test_flags_understand_petscs_words(options, text, value):
    options(t_flag=text)
    assert read(Some).flag is value


@pytest.mark.parametrize(
    "name, text, legal",
    [
        ("number", "1", ">= 2"),
        ("number", "10", "<= 9"),
        ("number", "2.5", "integer"),
        ("number", "", "integer"),
        ("size", "0", "> 0"),
        ("size", "nan", "finite"),
        ("size", "inf", "finite"),
        ("size", "big", "finite"),
        ("word", "three", r"one \| two"),
        ("flag", "maybe", "true or false"),
        ("maybe", "nan", "finite"),
    ],
)
def test_what_is_not_legal_is_named_with_what_is(options, name, text, legal):
    options(**{f"t_{name}": text})
    with pytest.raises(InputError, match=legal) as error:
        read(Some)
    assert f"-t_{name}" in str(error.value) and text in str(error.value)


def test_settings_made_by_hand_are_checked():
    check(Some())
    with pytest.raises(InputError, match="size"):
        check(Some(size=-1.0))


def test_help_names_every_setting_with_default_and_legal_values():
    (section,) = sections(Some, number=5)
    text = section.text()
    assert text.startswith("A group of options:\n")
    for words in ("-t_number <5>: a number (an integer >= 2 and <= 9)", "-t_word <one>: a word (one | two)"):
        assert words in text


def test_an_option_that_nobody_reads_is_found(options):
    options(t_nmber=4, t_flag="")
    read(Some)
    assert unread() == ["t_nmber"]
    with pytest.raises(InputError, match="did you mean -t_number"):
        require_all_read()


def test_defaults_of_petsc_options_give_way_and_are_not_unread(options):
    options(t_mine="user")
    set_default("t_mine", "ours"), set_default("t_other", "ours")
    assert PETSc.Options("t_").getString("mine") == "user"
    assert unread() == []
    PETSc.Options().delValue("t_other")


@dataclass(frozen=True)
class Inner(Settings, prefix="inner_"):
    """An inner solver."""

    depth: int = setting(1, "depth")


@dataclass(frozen=True)
class Outer(Settings, prefix="outer_", includes=(Some,)):
    """An outer solver."""

    kind: str = setting("plain", "kind", choices=("plain", "nested"), reads={"nested": (Inner,)})


def test_help_follows_what_is_read_and_under_which_choice():
    found = {section.settings: section for section in sections(Outer)}
    assert list(found) == [Outer, Some, Inner]
    assert found[Some].when == ((),) and found[Inner].when == ((("outer_kind", "nested"),),)
    assert found[Inner].text().startswith("An inner solver (with -outer_kind nested):\n  -inner_depth <1>")


def test_a_choice_that_is_the_scripts_default_needs_no_words():
    found = {section.settings: section for section in sections(Outer, kind="nested")}
    assert found[Inner].when == ((),) and found[Outer].options == {"outer_kind": "nested"}


@dataclass(frozen=True)
class Solver(Settings, prefix="solver_"):
    """A solver with others inside."""

    method: str = setting(
        "fast",
        "method",
        choices=("fast", "safe", "slow"),
        reads={
            "fast": (Section(Outer, outer="solver_", defaults={"kind": "nested"}),),
            "safe": (Section(Outer, outer="solver_"), Inner),
            "slow": (Inner,),
        },
    )


def test_help_shows_the_shortest_conditions_and_the_prefix_that_is_read():
    found = {section.settings: section for section in sections(Solver, outer="my_")}
    assert found[Outer].outer == "my_solver_" and found[Outer].options == {"my_solver_outer_kind": "nested"}
    assert found[Outer].when == found[Inner].when == ((),)  # as the default reads them
    found = {section.settings: section for section in sections(Solver, method="other")}
    nested = (("solver_method", "safe"), ("solver_outer_kind", "nested"))
    assert nested not in found[Inner].when  # says no more than ("solver_method", "safe")
    assert found[Inner].text().startswith("An inner solver (with -solver_method fast | safe | slow):")


def test_options_with_the_outer_prefix_win_over_those_without(options):
    options(inner_depth=2)
    assert read_inner(Inner, "my_").depth == read(Inner).depth == 2
    options(my_inner_depth=3)
    assert read_inner(Inner, "my_").depth == 3 and read(Inner).depth == 2
