"""Teams of processes: the same iterates on any number of them, with MPI and with torch.distributed."""

import json

import pytest
import torch.distributed as dist
from mpi4py import MPI

from pdeopt.core.errors import InputError
from pdeopt.core.team import TorchTeam, team_of
from pdeopt.functions.sharing import share
from pdeopt.functions.smooth import Tally
from tests.helpers.parallel_apts import runs
from tests.helpers.support import gloo, python


@pytest.mark.mpi
@pytest.mark.parametrize(
    "backend, ranks",
    [
        ("mpi", 2),
        pytest.param("mpi", 4, marks=pytest.mark.slow),
        pytest.param("gloo", 1, marks=pytest.mark.slow),
        pytest.param("gloo", 2, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_makes_the_same_iterates(tmp_path, backend, ranks):
    file = tmp_path / "found.json"
    if backend == "mpi":
        done = python("-m", "tests.helpers.parallel_apts", backend, file, ranks=ranks)
        assert done.returncode == 0, done.stderr
    else:
        if not dist.is_available():
            pytest.skip("this PyTorch is without torch.distributed")
        gloo(ranks, "tests.helpers.parallel_apts", backend, file)
    assert json.loads(file.read_text()) == json.loads(json.dumps(runs(None)))


def test_mpi_is_a_team_as_it_is():
    assert team_of() is MPI.COMM_WORLD
    assert share(MPI.COMM_SELF, 3, str, Tally()) == ["0", "1", "2"]


def test_bad_back_ends_are_named():
    with pytest.raises(InputError, match="gloo"):
        team_of("smoke signals")
    with pytest.raises(InputError, match="not initialized"):
        TorchTeam()
    if not dist.is_nccl_available():
        with pytest.raises(InputError, match="nccl"):
            team_of("nccl")
