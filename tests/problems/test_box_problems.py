"""The published numbers of Box and LSGD, and what a user of the two scripts sees."""

import json

import pytest
import torch

from pdeopt.core.errors import InputError
from problems import box_init, function_regression
from tests.helpers.support import python


def rms(*words):
    return function_regression.main(list(map(str, words)))


# -- the image of the unit square ----------------------------------------------------------------------------


def images(kind, depth=128, seeds=20):
    square = box_init.square(17)
    return box_init.measure([box_init.image(kind, depth, seed, square) for seed in range(seeds)])


def test_box_keeps_size_and_shape_through_128_layers():
    largest, ratio = images("box")
    assert largest < 2 and ratio > 0.5


@pytest.mark.parametrize("kind", ["he", "glorot"])
def test_the_others_blow_up_and_flatten(kind):
    largest, ratio = images(kind)
    assert largest > 1e12 and ratio < 1e-12


def test_the_square_itself_has_its_own_measures():
    assert box_init.measure([box_init.square(5)]) == pytest.approx((1.0, 1.0))
    line = torch.linspace(0, 3, 4, dtype=torch.float64)[:, None] * torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert box_init.measure([line])[0] == 3.0 and box_init.measure([line])[1] < 1e-15


def test_the_script_prints_a_table_and_returns_the_size_of_boxs_image(capfd, tmp_path):
    pytest.importorskip("matplotlib")
    assert box_init.main(["-seeds", "3", "-plot", str(tmp_path / "box.png")]) < 2
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["he", "glorot", "box"]
    assert (tmp_path / "box.png").read_bytes().startswith(b"\x89PNG")


# -- regression ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth, bar", [(1, 1e-2), (4, 3e-3), (16, 3e-3), (64, 3e-3)])
def test_box_and_lsgd_learn_the_sine_at_every_depth(depth, bar):
    assert rms("-depth", depth) <= bar


def test_adam_alone_is_far_behind():
    assert rms("-method", "adam", "-init", "he") > 20 * rms()


@pytest.mark.parametrize("init", ["he", "glorot", "box"])
@pytest.mark.parametrize("method", ["adam", "lsgd", "lm"])
def test_every_choice_runs_and_learns(init, method, tmp_path):
    words = ("-function", "discontinuous", "-init", init, "-method", method, "-steps", 20, "-depth", 3)
    found = rms(*words, "-summary", tmp_path / "s.json")
    summary = json.loads((tmp_path / "s.json").read_text())
    history = summary["history"]["rms_error"]
    assert len(history) == 21 and history[-1] == summary["rms_error"] == found
    assert found < history[0]
    assert summary["problem"]["init"] == init and "torch" in summary["versions"]


def test_the_same_seed_gives_the_same_number():
    assert rms("-steps", 5) == rms("-steps", 5) != rms("-steps", 5, "-seed", 1)


def test_the_error_is_that_of_the_network():
    settings = function_regression.RegressionSettings(steps=5)
    regression = function_regression.Regression(settings)
    losses = regression.train()
    error = (regression.fit() - regression.y).square().mean().sqrt()
    assert float(error) == pytest.approx(losses[-1] ** 0.5, rel=1e-8) == pytest.approx(rms("-steps", 5))


def test_the_discontinuous_function_jumps_once():
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    jumps = function_regression.discontinuous(x).diff().abs() > 0.1
    assert jumps.nonzero().tolist() == [[499]]


def test_the_picture_is_one(tmp_path):
    pytest.importorskip("matplotlib")
    rms("-steps", 2, "-plot", tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_bytes().startswith(b"<?xml")


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "main, words, legal",
    [
        (function_regression.main, ("-init", "xavier"), r"he \| glorot \| box"),
        (function_regression.main, ("-method", "sgd"), r"adam \| lsgd \| lm"),
        (function_regression.main, ("-function", "cosine"), r"sine \| discontinuous"),
        (function_regression.main, ("-depth", "0"), ">= 1"),
        (function_regression.main, ("-dpth", "3"), "-depth"),
        (function_regression.main, ("-summary", "s.txt"), ".json"),
        (box_init.main, ("-point", "3"), "-points"),
        (box_init.main, ("-plot", "p.gif"), ".png"),
    ],
)
def test_what_is_not_legal_is_refused(main, words, legal):
    with pytest.raises(InputError, match=legal):
        main(list(words))


def test_the_script_is_a_program(tmp_path):
    done = python("-m", "problems.function_regression", "-steps", 3, "-summary", tmp_path / "s.json")
    assert done.returncode == 0 and "RMS error" in done.stdout, done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["problem"]["steps"] == 3
