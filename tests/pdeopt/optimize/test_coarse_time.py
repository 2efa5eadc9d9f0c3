import pytest
import torch

from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.errors import InputError
from pdeopt.optimize.coarse_time import time_hierarchy, with_coarse_space
from pdeopt.optimize.descent.schwarz import SPQN
from pdeopt.optimize.tao import TaoSolver
from tests.helpers import examples

NAMES = ["burgers", "burgers nodal", "layer"]


def test_the_coarse_space_pays():
    """Two levels need fewer gradients than TAO's limited-memory method, everything counted."""
    problem = examples.burgers(nx=16, nt=32)
    f = with_coarse_space(ReducedObjective(problem))
    assert len(f) == 2
    result = SPQN(f, local_it=0, memory=50, coarse_rtol=1e-3).minimize(torch.zeros(f.size, dtype=torch.float64))
    tao = TaoSolver(ReducedObjective(problem)).solve()
    assert result.converged and result.history[-1].objective == pytest.approx(tao.objective, rel=1e-10)
    assert result.history[-1].work < 0.7 * tao.iterations


def test_what_has_no_coarser_steps_says_so():
    assert len(with_coarse_space(ReducedObjective(examples.EXAMPLES["burgers nodal"]()))) == 1
    with pytest.raises(InputError, match="control map"):
        time_hierarchy(ReducedObjective(examples.EXAMPLES["burgers nodal"]()), 2)
