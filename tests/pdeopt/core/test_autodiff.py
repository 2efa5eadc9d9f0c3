"""PyTorch's modes and threads make no difference: the same numbers to the last bit."""

import threading

import pytest
import torch

from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.autodiff import columns, jvp
from pdeopt.optimize.choice import solve
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers import examples


class default_dtype:
    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)


class UsesDefaults(examples.Dense):
    """Makes tensors where and of the type that are PyTorch's defaults, as a user does."""

    def initial_state(self, p):
        return super().initial_state(p) + torch.zeros(self.state_dim, dtype=torch.float64)


PARTS = UsesDefaults(2), examples.dense(num_steps=3)  # made where memory is


def numbers():
    """What a user does: make a problem, evaluate it, solve it."""
    constraint, like = PARTS
    problem = ControlProblem(constraint, like.objective, TimeGrid(like.grid.times))
    reduced = ReducedObjective(problem)
    x = torch.ones(reduced.size, dtype=torch.float64, device="cpu")
    value, gradient = reduced.value_and_gradient(x)
    product = reduced.hvp(x, gradient)
    result = solve(problem, method="newton", max_it=2)
    return [value, float(gradient.norm()), float(product.norm()), result.objective]


@pytest.fixture(scope="module")
def expected():
    return numbers()


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.float16),
        lambda: torch.device("meta"),  # a device without memory: whatever is made on it by default is missed
    ],
    ids=["inference", "no_grad", "double", "half", "device"],
)
def test_modes_make_no_difference(mode, expected):
    with mode():
        assert numbers() == expected


@pytest.mark.parametrize("made_in_inference", [True, False])
def test_a_problem_may_be_made_in_one_mode_and_solved_in_another(made_in_inference):
    with torch.inference_mode(made_in_inference):
        problem = examples.heat()
    with torch.inference_mode(not made_in_inference):
        found = solve(problem).objective
    assert found == solve(examples.heat()).objective


def test_threads_take_turns(expected):
    found, threads = [], [threading.Thread(target=lambda: found.append(numbers())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_rows_that_share_memory_are_differentiated_in_memory_of_their_own():
    """PyTorch refuses such points under a vectorized product, and lays out tangents of a part like the whole."""
    laid_out = []

    def cube(x):
        laid_out.append(x)
        return x**3

    u = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for point in (u.expand(3, -1), torch.cat([u.expand(3, -1), torch.zeros(1000, 2, dtype=torch.float64)])[:3]):
        found = columns(lambda d, x=point: jvp(cube, (x,), (d.expand(3, -1),)), torch.eye(2, dtype=torch.float64))
        assert torch.equal(found[:, 0], torch.diag(3 * u**2))
        own = unwrapped(laid_out[-1])
        assert own.untyped_storage().nbytes() == own.numel() * own.element_size()


def unwrapped(x):
    """The tensor behind those of transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x
