"""Training by splitting as a script: what its summary says, its clock, how samples are dealt out, ranks."""

import json
import time

import numpy as np
import pytest

import nn_adapters as nna
from pdeopt.core.errors import InputError
from pdeopt.core.memory import forget_peak, used_memory
from problems import admm_mnist
from problems.shared.split_training import CpuClock, deal
from tests.helpers.checkpointed import common
from tests.helpers.parallel_admm import WORDS
from tests.helpers.support import python


def summary(folder, *words):
    accuracy = admm_mnist.main([*map(str, words), "-summary", str(folder / "s.json")])
    found = json.loads((folder / "s.json").read_text())
    assert found["test_accuracy"] == accuracy
    return found


def test_digits_are_learned_and_the_summary_says_how(tmp_path):
    picture = tmp_path / "p.png"
    found = summary(tmp_path, "-widths", 50, "-split_batch", 300, "-epochs", 6, "-plot", picture)
    assert found["data"] == "digits" and found["reason"] == "WORK_DONE" and found["test_accuracy"] > 0.9
    curve = found["curve"]
    assert [mark["epoch"] for mark in curve] == sorted(mark["epoch"] for mark in curve) and curve[0]["iteration"] == 0
    assert curve[-1]["iteration"] == found["iterations"] == int(np.ceil(6 * 1438 / 300))
    assert curve[-1]["train_loss"] < 0.2 * curve[0]["train_loss"] and curve[-1]["test_accuracy"] > 0.9
    seconds = [mark["cpu_seconds"] for mark in curve]
    assert seconds == sorted(seconds) and found["bytes_sent"]["together"] == 0
    (memory,) = found["memory"]
    assert memory["samples"] == 1438 and picture.stat().st_size > 0
    parts = dict(memory["predicted_mb"])
    assert parts.pop("all") == pytest.approx(sum(parts.values())) and min(parts.values()) >= 0
    assert 1.0 <= parts["data"] / (1438 * (64 * 4 + 8) / 1e6) < 1.1 and memory["observed_mb"]["imports"] > 0


def test_the_published_form_crawls_from_random_states(tmp_path):
    """States of a forward pass are what makes it learn."""
    words = ("-widths", 40, "-form", "seed", "-activation", "hard_sigmoid", "-epochs", 25)
    found = {states: summary(tmp_path, *words, "-states", states) for states in ("forward", "random")}
    assert found["forward"]["parameters"]["split_states"] == "forward"
    assert found["forward"]["test_accuracy"] > found["random"]["test_accuracy"] + 0.05
    notes = [row["note"] for row in found["forward"]["history"]]
    assert notes[1:11] == ["blocks alone"] * 10 and notes[11:] == [""] * 15  # the multipliers wait


def test_memory_that_was_freed_is_no_peak():
    forget_peak()
    now = used_memory()[0]
    block = np.ones(20_000_000)
    assert used_memory()[1] >= now + 0.9 * block.nbytes
    del block
    forget_peak()
    assert used_memory()[1] < now + 80e6


def test_layers_of_an_ode_network_learn_peaks(tmp_path):
    found = summary(tmp_path, "-data", "peaks", "-layers", 4, "-epochs", 5)
    assert found["test_accuracy"] > 0.5


def test_the_clock_does_not_count_what_it_is_paused_for():
    clock = CpuClock(before=5.0)
    with clock.paused():
        begin = time.process_time()
        while time.process_time() < begin + 0.05:
            pass
        first = clock.seconds
    assert 5.0 <= first <= clock.seconds < 5.04


# -- ranks -------------------------------------------------------------------------------------------------------


class FirstOfThree:
    """The first rank of a communicator whose others agree."""

    rank, size = 0, 3

    def bcast(self, value, root=0):
        return value


def test_more_ranks_than_samples_are_refused():
    with pytest.raises(InputError, match="samples: got 2; legal: >= 3, the ranks"):
        deal(FirstOfThree(), lambda: nna.load_dataset("peaks"), [], limit=2)
    for shares in ([1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(InputError, match="-shares"):
            deal(FirstOfThree(), lambda: nna.load_dataset("peaks"), shares)


@pytest.mark.mpi
def test_ranks_with_unequal_shares_train_the_same_network_and_go_on_bit_for_bit(tmp_path):
    done = python("-m", "tests.helpers.parallel_admm", tmp_path, ranks=3)
    assert done.returncode == 0, done.stderr
    whole, restarted = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "restarted"))
    assert common(restarted) == common(whole)
    assert [each["samples"] for each in whole["memory"]] == [133, 0, 67]
    serial = summary(tmp_path, *WORDS)
    assert np.allclose(
        [mark["train_loss"] for mark in whole["curve"]], [mark["train_loss"] for mark in serial["curve"]], rtol=1e-9
    )
    assert min(whole["bytes_sent"]["each_rank"]) > 0
