"""Words of command lines that are wrong, made from what the scripts say of their options."""

from __future__ import annotations

import dataclasses
import random

from pdeopt.core.settings import option_of
from tests.helpers.scripts import SMALL, options_of

#: What no option of a kind may be.
WRONG = {
    int: ["abc", "1.5", "nan", "1_000", "٣", "1e400", "0x10", ""],
    float: ["abc", "nan", "inf", "-inf", "1_0.5", "٣.5", "1e999", ""],
    bool: ["maybe", "2", "ja"],
    str: [""],
}

#: Names of files that cannot be written, or read; `{}` is a folder that is there.
FILES = {
    "summary": ["/nonexistent/s.json", "{}/s.txt", "{}"],
    "plot": ["/nonexistent/p.png", "{}/p.bmp", "{}"],
    "output": ["/nonexistent/o.npz", "{}/o.csv", "{}"],
    "checkpoint": ["/nonexistent/c", "{}"],
    "restart": ["/nonexistent/c", "{}", "/dev/null"],
    "data": ["nowhere", "{}"],
    "mesh": ["/nonexistent/m.msh", "{}", "/dev/null"],
}

#: Options of PETSc's own objects in a control problem.
PETSC = [
    ("-solver", "tao", "-tao_type", "foo"),
    ("-solver", "tao", "-tao_gatol", "abc"),
    ("-solver", "tao", "-tao_max_it", "-4"),
    ("-solver", "tao", "-tao_max_it", "1.5"),
    ("-solver", "tao", "-tao_type", "python", "-tao_python_type", "nope.Nope"),
    ("-solver", "tao", "-tao_ls_type", "foo"),
    ("-sqp_kkt_ksp_type", "foo"),
    ("-sqp_kkt_pc_type", "foo"),
    ("-sqp_kkt_ksp_rtol", "abc"),
    ("-sqp_kkt_ksp_max_it", "many"),
    ("-sqp_kkt_precond", "wathen", "-sqp_kkt_ksp_type", "cgg"),
]

#: Words that are wrong wherever they stand.
ANYWHERE = [
    ("stray",),
    ("-no_such_option", "1"),
    ("-nx", "4", "5"),
    ("--", "1"),
    ("-options_file", "/nonexistent"),
    ("-",),
]


def wrong_values(each):
    """Values that a field of settings does not allow."""
    limits = each.metadata
    values = list(WRONG[limits["kind"]]) if limits["choices"] is None else ["nonsense", ""]
    whole = limits["kind"] is int
    for key, step in (("at_least", -1), ("above", 0), ("at_most", 1)):
        if limits[key] is not None:
            bound = limits[key] + step * (1 if whole else 1e-3 + abs(limits[key]))
            values.append(str(int(bound) if whole else bound))
    return values


def all_bad_options(folder):
    """(script, words) of every wrong value of every option, under the choices that read it."""
    for script in SMALL:
        names = set()
        for section in options_of(script):
            choices = [word for option, value in section.when[0] for word in (f"-{option}", value)]
            prefix = section.outer + section.settings.prefix
            for each in dataclasses.fields(section.settings):
                name = prefix + option_of(each)
                if f"-{name}" in choices[::2]:
                    continue
                names.add(name)
                values = [value.format(folder) for value in FILES.get(name, [])] + wrong_values(each)
                yield from ((script, (*choices, f"-{name}", *filter(None, [value]))) for value in values)
        yield from ((script, (f"-{name[:-1]}{name[-1] * 2}", "1")) for name in sorted(names))
        yield from ((script, words) for words in ANYWHERE)
        if "solver" in names:
            yield from ((script, words) for words in PETSC)


def drawn(folder, count, seed):
    """So many of them, each script's turn after the other's, with the options that make a run small before them."""
    by_script = {script: [] for script in SMALL}
    for script, words in all_bad_options(folder):
        by_script[script].append(words)
    draw = random.Random(seed)
    for cases in by_script.values():
        draw.shuffle(cases)
    scripts = sorted(SMALL)
    draw.shuffle(scripts)
    for number in range(count):
        script = scripts[number % len(scripts)]
        words = by_script[script][number // len(scripts)]
        yield script, [*small_without(script, words), *words]


def small_without(script, words):
    """The options that make a run small, without those that the case gives."""
    pairs = zip(SMALL[script][::2], SMALL[script][1::2])
    unread = {"tao": "-sqp_max_it"}
    return [
        word for pair in pairs if pair[0] not in (*words, *(unread[w] for w in words if w in unread)) for word in pair
    ]
