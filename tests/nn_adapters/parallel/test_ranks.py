"""Training on several ranks equals serial training, and sends what is counted."""

import pytest

from tests.helpers.support import python


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_training_on_ranks_is_serial_training(ranks):
    done = python("-m", "tests.helpers.parallel_training", ranks=ranks)
    assert done.returncode == 0, done.stderr


@pytest.mark.mpi
@pytest.mark.slow
def test_a_rank_that_is_lost_ends_all_with_its_message():
    done = python("-m", "tests.helpers.parallel_training", "lost", ranks=2, timeout=120)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
