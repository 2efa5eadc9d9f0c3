import pytest
import torch

from pdeopt.control.metric import RieszMetric
from pdeopt.control.verify import randomize, symmetry_error
from pdeopt.core.errors import InputError
from pdeopt.kkt.layout import KKTLayout
from pdeopt.kkt.operator import KKTOperator
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import dense, entries, relative

HESSIANS = ["metric", "full", "gauss-newton"]


def at_random(name, hessian, seed=4):
    problem = examples.EXAMPLES[name]()
    x, lam = randomize(problem.create_primal(), seed), randomize(problem.create_multiplier(), seed + 1)
    x.scale(0.5)
    operator = KKTOperator(RieszMetric(problem), hessian)
    operator.set_point(problem.at(x), lam)
    k = torch.cat([entries(x), entries(lam)])
    return problem, operator, Oracle(problem).kkt(k, hessian)


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_the_shell_is_the_dense_hessian_of_the_lagrangian(name, hessian):
    _, operator, expected = at_random(name, hessian)
    shell = operator.shell()
    assert relative(dense(shell), expected) <= 1e-12
    shell.destroy()


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("name", examples.PATTERNED)
def test_the_assembled_matrix_is_the_dense_hessian_of_the_lagrangian(name, hessian):
    _, operator, expected = at_random(name, hessian)
    assert relative(dense(operator.assemble()), expected) <= 1e-12
    operator.free()


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("name", examples.PATTERNED)
def test_shell_and_assembled_matrix_are_symmetric_and_equal(name, hessian):
    problem, operator, _ = at_random(name, hessian)
    matrix, shell = operator.assemble(), operator.shell()
    k = randomize(problem.create_kkt(), 9)
    a, b = k.duplicate(), k.duplicate()
    matrix.mult(k, a), shell.mult(k, b)
    assert relative(entries(a), entries(b)) <= 1e-13
    assert symmetry_error(shell) <= 1e-15 and symmetry_error(matrix) <= 1e-15
    shell.destroy(), operator.free()


def test_a_matrix_refilled_at_another_point_is_that_of_the_point():
    problem, operator, _ = at_random("dense nodal", "full")
    operator.assemble()
    x, lam = randomize(problem.create_primal(), 20), randomize(problem.create_multiplier(), 21)
    operator.set_point(problem.at(x), lam)
    expected = Oracle(problem).kkt(torch.cat([entries(x), entries(lam)]), "full")
    assert relative(dense(operator.assemble()), expected) <= 1e-12
    operator.free()


def test_fields_partition_the_kkt_vector_and_pick_the_blocks():
    problem, operator, expected = at_random("dense nodal", "full")
    sets = KKTLayout(problem).index_sets()
    numbers = {name: torch.as_tensor(s.getIndices()) for name, s in sets.items()}
    assert torch.equal(torch.cat(list(numbers.values())).sort().values, torch.arange(len(expected)))
    matrix = operator.assemble()
    for row, i in numbers.items():
        for col, j in numbers.items():
            block = matrix.createSubMatrix(sets[row], sets[col])
            assert torch.allclose(dense(block), expected[i][:, j], atol=1e-12)
    assert not expected[numbers["multiplier"]][:, numbers["multiplier"]].any()
    operator.free()


def test_pairing_puts_nonzeros_on_the_diagonal():
    _, operator, expected = at_random("burgers nodal", "metric")
    rows, cols = operator.layout.pairing()
    for order in (rows, cols):
        assert sorted(order) == list(range(len(expected)))
    assert (expected[rows, cols] != 0).all()


def test_a_matrix_free_constraint_has_no_assembled_matrix():
    _, operator, _ = at_random("layer", "full")
    with pytest.raises(InputError, match="pattern"):
        operator.assemble()


def test_an_unknown_hessian_is_refused():
    with pytest.raises(InputError, match="gauss-newton"):
        KKTOperator(RieszMetric(examples.heat()), "newton")
