"""The scripts that write checkpoints, runs of them, and what of a summary two equal runs have in common."""

from __future__ import annotations

import json
import random

from tests.helpers.scripts import SMALL, options_of

#: Runs, by what is tried: script, options of a run of tenths of a second, and what makes it one of seconds.
RUNS = {
    "burgers, SQP": ("burgers", "-nx 12 -nt 16", "-nx 64 -nt 96"),
    "burgers, Newton": ("burgers", "-nx 12 -nt 16 -solver newton -nu 0.005", "-nx 32 -nt 64"),
    "burgers, TAO": ("burgers", "-nx 12 -nt 16 -solver tao -tao_max_it 12", "-nx 48 -nt 64"),
    "burgers, bounds": ("burgers", "-nx 12 -nt 16 -solver active_set -lower -0.3 -upper 0.3", "-nx 32 -nt 48"),
    "heat": ("heat", "-nx 6 -ny 4 -nt 8", "-nx 12 -ny 6 -nt 16"),
    "klein_gordon": ("klein_gordon", "-nx 8 -nt 16", "-nx 20 -nt 48"),
    "pinn, Levenberg-Marquardt": (
        "pinn_burgers",
        "-points 60 -width 4 -opt_max_it 20 -lm_candidates 300 -checkpoint_every 1",
        "-points 1000 -opt_max_it 40",
    ),
    "pinn, SPQN": (
        "pinn_allen_cahn",
        "-points 60 -width 4 -opt_max_it 4 -optimizer spqn -checkpoint_every 1",
        "-points 200",
    ),
    "peaks": ("peaks", "-layers 8 -samples 60 -epochs 3", "-epochs 40"),
    "mnist": ("mnist", "-data digits -layers 4 -channels 2 -samples 60 -epochs 3", "-epochs 30"),
    "fashion_mnist": ("fashion_mnist", "-data digits -layers 4 -channels 2 -samples 60 -epochs 2", "-epochs 30"),
    "indian_pines": ("indian_pines", "-layers 8 -samples 60 -epochs 3", "-epochs 25"),
    "har_gru": ("har_gru", "-hidden 4 -samples 40 -epochs 2", "-epochs 8"),
    "video_gru": ("video_gru", "-videos 24 -length 4 -size 8 -epochs 2", "-epochs 16"),
    "transformer": (
        "transformer",
        "-layers 4 -width 8 -hidden 8 -windows 100 -tokens 4 -dropout 0.1 -epochs 2",
        "-windows 2000 -epochs 8",
    ),
    "logistic": ("logistic", "-samples 200 -features 20 -optimizer lbfgs", "-samples 4000 -features 200"),
    "logistic, MLVR": ("logistic", "-samples 200 -features 20 -optimizer mlvr", "-samples 4000 -features 200"),
    "resnet_multilevel": (
        "resnet_multilevel",
        "-data digits -samples 60 -layers 8 -width 4 -opt_max_it 3",
        "-samples 400 -opt_max_it 12",
    ),
    "apts_mnist": (
        "apts_mnist",
        "-data digits -samples 120 -opt_max_it 4 -opt_max_work 10",
        "-opt_max_it 20 -opt_max_work 60",
    ),
    "admm_mnist": (
        "admm_mnist",
        "-data digits -samples 200 -widths 12 -split_batch 40 -epochs 3 -checkpoint_every 2",
        "-samples 1000 -epochs 60",
    ),
    "admm_mnist, seed": (
        "admm_mnist",
        "-data digits -samples 100 -widths 12 -form seed -epochs 4 -checkpoint_every 1",
        "-samples 1000 -epochs 100",
    ),
    "kfac_mnist": (
        "kfac_mnist",
        "-data digits -samples 120 -batch 30 -max_steps 12 -checkpoint_every 1",
        "-samples 1000 -max_steps 600",
    ),
    "large_batch": (
        "large_batch",
        "-data digits -samples 120 -widths 12 -batch 30 -epochs 3 -mixup 0.4 -checkpoint_every 1",
        "-samples 1000 -epochs 100",
    ),
    "autoencoder": (
        "autoencoder",
        "-data digits -samples 120 -batch 60 -max_steps 6 -checkpoint_every 1 -optimizer hessian_free",
        "-samples 1000 -max_steps 100",
    ),
    "compress": (
        "compress",
        "-data digits -samples 120 -batch 30 -max_steps 12 -checkpoint_every 1 -how quantization",
        "-samples 1000 -max_steps 2000",
    ),
    "function_regression": ("function_regression", "-steps 60", "-steps 500"),
    "box_init": ("box_init", "-seeds 2 -depth 3", "-seeds 8 -depth 8"),
}

#: Of a summary, what a restart does not have in common with a run of one piece: times, memory, and its options.
OWN = ("seconds", "time", "costs", "memory", "versions", "restart", "checkpoint", "files")


def has_checkpoints(name):
    """Whether the script of a run has the option -checkpoint."""
    return any("checkpoint" in section.options for section in options_of(RUNS[name][0]))


def words_of(name, long=False):
    """Options of a run, as a list of words."""
    script, short, more = RUNS[name]
    given = {}
    for text in (short, more) if long else (short,):
        words = text.split()
        given |= dict(zip(words[::2], words[1::2]))
    return script, [word for pair in given.items() for word in pair]


def result(path):
    """What a summary says, but times and the like."""
    return common(json.loads(path.read_text()))


def common(value, name=""):
    if isinstance(value, dict):
        return {key: common(item, key) for key, item in value.items() if not any(word in key for word in OWN)}
    if isinstance(value, list):
        return [common(item) for item in value]
    return value


def differences(a, b, where=""):
    """Where two values of JSON differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in sorted({*a, *b}) for d in differences(a.get(key), b.get(key), f"{where}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for number, pair in enumerate(zip(a, b)) for d in differences(*pair, f"{where}[{number}]")]
    return [] if a == b else [f"{where}: {str(a)[:60]} and {str(b)[:60]}"]


def mutated(content, draw):
    """(what was done, the content after it): damage of a disk, of a transfer, or of a hand."""
    size = len(content)
    i, j = sorted(draw.randrange(size + 1) for _ in range(2))
    junk = random.Random(draw.random()).randbytes(draw.randrange(1, 40))
    at = draw.randrange(size)
    return draw.choice(
        [
            ("bit", content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]),
            ("byte", content[:at] + junk[:1] + content[at + 1 :]),
            ("early bit", _flipped(content, draw.randrange(min(size, 64)), draw)),
            ("cut", content[:at]),
            ("grown", content + junk),
            ("inserted", content[:at] + junk + content[at:]),
            ("lost", content[:i] + content[j:]),
            ("zeros", content[:i] + bytes(j - i) + content[j:]),
            ("twice", content[:j] + content[i:]),
            ("swapped", content[j:] + content[i:j] + content[:i]),
            ("empty", b""),
            ("junk", junk),
            ("digit", _digit(content, draw)),
        ]
    )


def _flipped(content, at, draw):
    return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]


def _digit(content, draw):
    """Another digit in the place of one, as in a number of a header."""
    places = [i for i, byte in enumerate(content[:4000]) if 48 <= byte < 58] or [0]
    at = draw.choice(places)
    return content[:at] + bytes([48 + draw.randrange(10)]) + content[at + 1 :]


assert {RUNS[name][0] for name in RUNS} <= set(SMALL)
