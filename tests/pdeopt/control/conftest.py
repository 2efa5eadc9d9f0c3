"""All examples, and a random point of each."""

import pytest

from pdeopt.control.verify import randomize
from tests.helpers import examples


@pytest.fixture(params=examples.EXAMPLES)
def problem(request):
    return examples.EXAMPLES[request.param]()


@pytest.fixture
def x(problem):
    x = randomize(problem.create_primal(), 4)
    x.scale(0.5)
    return x
