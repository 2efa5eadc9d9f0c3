"""Small dense networks as control problems, and their Gauss-Newton steps; under mpiexec, what all ranks find.

`mpiexec -n R python -m tests.helpers.dense_networks FILE` writes design, objectives and works of a few steps.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from petsc4py import PETSc
from torch import nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.control.densenetwork import DenseNetwork
from nn_adapters.control.scoreloss import classification_loss
from pdeopt.control.controlmap import Jumps, SmoothCost
from pdeopt.optimize.curvedproblem import curved_function

WIDTH, CLASSES = 3, 4


def dense_problem(layers=8, samples=12, act="tanh", opening="dense", T=2.0, seed=0, smoothness=0.0):
    """A problem, its first design (whole), and the network of PyTorch's modules."""
    torch.manual_seed(seed)
    x = torch.randn(samples, WIDTH if opening == "none" else 2, dtype=torch.float64)
    labels = torch.arange(samples) % CLASSES
    affine = nn.Linear(2, WIDTH)
    first = {"none": None, "affine": affine, "dense": nn.Sequential(affine, nna.activation(act))}[opening]
    stack = nna.LayerStack(lambda: nna.dense(WIDTH, act), layers, T)
    head = nn.Linear(WIDTH, CLASSES)
    constraint, grid = (
        nna.LayerConstraint(stack.layers[0], x, first, head, smoothness > 0),
        po.TimeGrid.uniform(layers, T),
    )
    price = SmoothCost(1e-2, smoothness) if smoothness else po.ControlCost(1e-2)
    objective = classification_loss(constraint, None, labels) + price + nna.ParameterCost(2e-2)
    problem = po.ControlProblem(constraint, objective, grid, Jumps(grid, constraint.weights) if smoothness else None)
    rows, p = nna.control_of(stack.layers), constraint.first_parameters()
    network = nn.Sequential(*([] if first is None else [first]), stack, head).double()
    return problem, (rows, p), network, labels


def own(problem, start):
    """The design's entries of this rank."""
    rows, p = start
    grid = problem.grid
    return torch.cat([rows[grid.begin : grid.end].reshape(-1), p if grid.is_first else p[:0]])


def main(file):
    found = {}
    for states, sweeps in (("eliminated", "serial"), ("unknown", "mgrit"), ("eliminated", "one_shot")):
        problem, start, *_ = dense_problem(layers=16, smoothness=1e-3 * (sweeps == "serial"))
        if sweeps != "serial":
            PETSc.Options().setValue("layer_mgrit_coarsening", "4,2")
            PETSc.Options().setValue("layer_mgrit_levels", "3")
        function = curved_function(problem, states=states, sweeps=sweeps)
        assert isinstance(function, DenseNetwork)
        result = po.GaussNewton(function, max_it=5).minimize(own(problem, start))
        z, p = result.design.split([problem.layout.control_size, problem.layout.param_size])
        found[f"{states}_z"] = problem.grid.gather(z.reshape(problem.grid.n_local, -1))
        found[f"{states}_p"] = problem.layout.on_all_ranks(p).numpy()
        found[f"{states}_f"] = np.array(result.history["objective"])
        found[f"{states}_layers"] = np.array(function.chain.count.layers)
    if problem.grid.mpi.rank == 0:
        np.savez(file, **found)


if __name__ == "__main__":
    main(sys.argv[1])
