"""Layer-parallel networks on several ranks against PyTorch on one; run under mpiexec as a module."""

from __future__ import annotations

import copy
import pickle
import shutil
import tempfile
import traceback
from dataclasses import replace
from functools import partial
from itertools import product
from unittest.mock import patch

import numpy as np
import torch
from mpi4py import MPI
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from nn_adapters.data.generated import peaks
from nn_adapters.layers import batching
from nn_adapters.layers.blocks import conv, dense
from nn_adapters.layers.layerlist import LayerList
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import clip_grad_norm_, measure_bias, parameter_groups
from nn_adapters.layers.parts import fusedchain
from nn_adapters.layers.parts.dropout import drop
from nn_adapters.layers.recurrent import GRUParallel
from nn_adapters.parallel.groups import Groups
from nn_adapters.training.loop import Training, TrainingSettings
from nn_adapters.training.regularize import regularized

WORLD = MPI.COMM_WORLD


def gradients(network, loss):
    parameters = list(network.parameters())
    return torch.autograd.grad(loss, parameters)


def loss_of(network, x, labels):
    return nn.functional.cross_entropy(network(x), labels)


def equal(found, expected, tolerance):
    for a, b in zip(found, expected):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * max(float(b.abs().max()), 1e-12), float((a - b).abs().max())


class Classifier(nn.Module):
    """Opening layer, layers in parallel, closing layer."""

    def __init__(self, comm, block, features, opening, **words):
        super().__init__()
        self.opening = opening
        self.layers = LayerParallel(comm, block, 40, 2.0, serial="never", **words)
        self.closing = nn.Linear(features, 3)

    def forward(self, x):
        return self.closing(self.layers(self.opening(x)).flatten(1))


def networks(comm, **words):
    torch.manual_seed(0)
    yield Classifier(comm, lambda: dense(4), 4, nn.Linear(2, 4), **words).double(), (6, 2)
    torch.manual_seed(0)
    yield Classifier(comm, lambda: conv(2), 2 * 25, nn.Conv2d(1, 2, 3, padding=1), **words).double(), (6, 1, 5, 5)


def layers():
    """With enough cycles: the same numbers as on one rank, one layer after the other."""
    serial, words = networks(MPI.COMM_SELF, levels=1), {"cycles": 6, "adjoint_cycles": 6, "relaxation": "FCF"}
    for (network, shape), (alone, _) in zip(
        networks(WORLD, coarsening="4,2", levels=3, fused="intervals", **words), serial
    ):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        labels = torch.arange(6) % 3
        losses = [loss_of(net, x, labels) for net in (network, alone)]
        equal([losses[0].detach()], [losses[1].detach()], 1e-12)
        found, expected = (gradients(net, loss) for net, loss in zip((network, alone), losses))
        grid = network.layers.grid
        own = [
            g[grid.begin : grid.end] if name.startswith("layers.") else g
            for g, (name, _) in zip(expected, alone.named_parameters())
        ]
        equal(found, own, 1e-10)
        assert measure_bias(network, partial(loss_of, network, x, labels)) <= 1e-10
        network.layers.load_state_dict(alone.layers.serial().state_dict())  # a whole state on each rank
        for key, value in network.layers.full_state_dict().items():
            assert torch.equal(value, alone.layers.state_dict()[key])


def in_turn():
    """By default narrow layers go through the loop of one rank after the other, where that has less to do."""
    network, shape = next(networks(WORLD, cycles=0, adjoint_cycles=0))
    alone, _ = next(networks(MPI.COMM_SELF, levels=1))
    x, grid = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64), network.layers.grid
    values = [net(x) for net in (network, alone)]
    own, whole = (gradients(net, value.square().sum()) for net, value in zip((network, alone), values))
    if WORLD.size == 2 and fusedchain.has_compiler():
        equal(values[:1], values[1:], 1e-13)
        equal(own[2:4], [g[grid.begin : grid.end] for g in whole[2:4]], 1e-12)
    else:
        assert network.layers.solvers[0].misfits[0] > 0.0


def trajectory_sum(network, x):
    """Of all features after layers, so that sources enter the adjoint."""
    states, mpi = network.layers.trajectory(network.opening(x)), network.layers.grid.mpi
    own = states.square().sum()
    return own - own.detach() + mpi.allreduce(float(own.detach()))


def cycles():
    """After few cycles, too, the numbers do not depend on the ranks, with levels that only some ranks have.

    Layers are smooth in the first half of networks, so that long steps have mean weights, also where they move.
    """
    found = []
    words = {"coarsening": "3", "levels": 5, "cycles": 1, "adjoint_cycles": 1, "cycle": "F"}
    for comm, fused in ((WORLD, "intervals"), (MPI.COMM_SELF, "never")):
        for network, shape in networks(comm, fused=fused, **words):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            value = network(x).square().sum() + trajectory_sum(network, x)
            own = gradients(network, value)
            grid = network.layers.grid
            stacks = [g for g, (name, _) in zip(own, network.named_parameters()) if name.startswith("layers.")]
            whole = [np.concatenate(grid.mpi.allgather(g.numpy())) for g in stacks]
            found.append([value.detach().numpy(), *whole])
    half = len(found) // 2
    for a, b in zip(found[:half], found[half:]):
        equal(map(torch.as_tensor, a), map(torch.as_tensor, b), 1e-12)


def given():
    """Dropout has the same masks, to the bit, on any ranks and cycles; batch norms and their averages are the same."""
    x, found = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), []

    def block():
        return nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3))

    for comm, cycles, levels in ((MPI.COMM_SELF, 0, 1), (WORLD, 4, 2), (WORLD, 0, 1), (WORLD, 0, 2)):
        torch.manual_seed(0)
        words = {"coarsening": "4", "cycles": cycles, "adjoint_cycles": cycles, "levels": levels, "serial": "never"}
        network, masks = LayerParallel(comm, block, 16, 2.0, **words).double(), {}

        def noted(x, p, keys, place, masks=masks):
            for key, mask in zip(keys.tolist(), drop(torch.ones_like(x), p, keys, place)):
                masks[key] = mask.numpy()
            return drop(x, p, keys, place)

        with patch.object(batching, "drop", noted):
            value = [network(x).square().sum() for _ in range(2)][-1]
            own = gradients(network, value)
        stacks = [np.concatenate(network.grid.mpi.allgather(g.numpy())) for g in own]
        all_masks = {key: mask for part in network.grid.mpi.allgather(masks) for key, mask in part.items()}
        states = network.full_state_dict().values()
        found.append(([value.detach(), *map(torch.as_tensor, stacks), *states], all_masks))
    for _, masks in found:
        assert masks.keys() == found[0][1].keys() and len(masks) == 32  # of two calls of 16 layers
        assert all(np.array_equal(mask, found[0][1][key]) for key, mask in masks.items())
    for values, _ in found[1:3]:  # solved
        equal(values, found[0][0], 1e-10)


def unlike():
    """Lists of unlike blocks: as on one rank in series, and the same after few cycles, whose long steps may learn."""
    kinds = [
        lambda: dense(4),
        lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)),
    ]
    x, found = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), []
    for comm, cycles, long_steps in product((MPI.COMM_SELF, WORLD), (8, 1), ("stages", "fitted")):
        torch.manual_seed(0)
        words = {"coarsening": "2", "cycles": cycles, "adjoint_cycles": cycles, "levels": 2, "serial": "never"}
        words |= {"long_steps": long_steps}
        network = LayerList(comm, [kinds[k] for k in (0,) * 7 + (1, 0) * 3 + (1,) * 3], 2.0, **words).double()
        network(x).sum().backward()  # the batch before
        value = network(x).square().sum()
        whole = [np.concatenate(network.grid.mpi.allgather(g.numpy())) for g in gradients(network, value)]
        found.append([value.detach(), *map(torch.as_tensor, whole), *network.full_state_dict().values()])
    for ours, expected in ((4, 0), (5, 0), (6, 2), (7, 3)):
        equal(found[ours], found[expected], 1e-10)


def splines():
    """Coefficients of splines: the same on all ranks, and as those of one rank in series, gradients and norms, too."""
    x, found = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), []
    for comm, levels in ((MPI.COMM_SELF, 1), (WORLD, 2)):
        torch.manual_seed(0)
        words = {"coarsening": "4", "levels": levels, "cycles": 5, "adjoint_cycles": 5, "serial": "never"}
        network = LayerParallel(comm, lambda: dense(4), 18, 2.0, **words).double().use_splines(2, 5)
        value = regularized(network(x).square().sum(), network, 1e-2, 1e-2)
        value.backward()
        own = [p.grad.clone() for p in network.parameters()]
        norm = clip_grad_norm_(network, 0.1)
        assert measure_bias(network, lambda network=network: network(x).square().sum()) <= 1e-10
        found.append([*own, norm, *(p.detach() for p in network.parameters())])
    equal(found[1], found[0], 1e-10)


def fitted():
    """Long steps that learn, those of each rank its own: the same losses and gradients on one rank, batch for batch."""
    words = {"coarsening": "4", "long_steps": "fitted", "adjoint_cycles": 1, "fused": "never"}
    for (network, shape), (alone, _) in zip(networks(WORLD, **words), networks(MPI.COMM_SELF, **words)):
        grid, labels = network.layers.grid, torch.arange(6) % 3
        for batch in range(3):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)
            losses = [loss_of(net, x, labels) for net in (network, alone)]
            equal([losses[0].detach()], [losses[1].detach()], 1e-12)
            found, expected = (gradients(net, loss) for net, loss in zip((network, alone), losses))
            names = [name for name, _ in alone.named_parameters()]
            own = [g[grid.begin : grid.end] if n.startswith("layers.") else g for n, g in zip(names, expected)]
            equal(found, own, 1e-9)


def sequences():
    words = dict(coarsening="2", levels=3, cycles=12, adjoint_cycles=12, relaxation="FCF", serial="never")
    for kind in ("implicit", "classic"):
        torch.manual_seed(3)
        network = GRUParallel(WORLD, 3, 4, 24, 2, kind, **words).double()
        x = torch.randn(5, 24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        ends = network(x), network.forward_in_series(x)
        equal([ends[0].detach()], [ends[1].detach()], 1e-12)
        with_hooks = gradients(network, ends[0].square().sum())
        alone = GRUParallel(None, 3, 4, 24, 2, kind, levels=1).double()
        alone.load_state_dict(network.state_dict())
        equal(with_hooks, gradients(alone, alone(x).square().sum()), 1e-10)


def samples():
    """Where cycles have no less to do each rank takes its samples, or none, through all steps: serial numbers."""
    for kind, count, is_masked in (("implicit", 5, True), ("classic", 2 * WORLD.size, False), ("implicit", 1, True)):
        torch.manual_seed(3)
        network = GRUParallel(WORLD, 3, 4, 22, 2, kind, coarsening="4").double()
        own = slice(network.grid.begin, network.grid.end)
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(count, 22, 3, generator=draw, dtype=torch.float64).requires_grad_()
        mask = torch.rand(count, 22, generator=draw) < 0.8 if is_masked else None
        found, expected = network(x, mask), network.forward_in_series(x, mask)
        assert network.solvers[0].is_dear() and network.solvers[0].misfits == (0.0, 0.0)
        equal([found.detach()], [expected.detach()], 1e-14)
        wanted = [x, *network.parameters()]
        for again in (True, False):
            g = torch.autograd.grad(found.square().sum(), wanted, retain_graph=again)
            g_expected = torch.autograd.grad(expected.square().sum(), wanted, retain_graph=again)
            equal(g[1:], g_expected[1:], 1e-12)
            equal([g[0][:, own]], [g_expected[0][:, own]], 1e-12)
        with torch.autocast("cpu"):
            equal([network(x, mask).detach()], [found.detach()], 1e-1)
        with torch.no_grad():
            equal([network(x, mask)], [found], 1e-14)
        for solver in network.solvers:
            solver.settings = replace(solver.settings, serial="never")
        assert measure_bias(network, lambda net=network, data=x: net(data).square().sum()) > 0  # by its cycles


def trained(network, x, target, **words):
    """The loss after a few steps of SGD with clipped gradients."""
    optimizer = torch.optim.SGD(parameter_groups(network, 0.01), lr=0.5, **words)
    for _ in range(4):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        clip_grad_norm_(network, 0.1)
        optimizer.step()


def manners():
    """Copies, pickles, evaluation, clipped gradients and half precision on these ranks are as in the serial network."""
    x, target = torch.linspace(-1, 1, 24).reshape(6, 4), torch.zeros(6, 4)
    torch.manual_seed(0)
    network = LayerParallel(WORLD, lambda: dense(4), 30, 2.0, coarsening="8", cycles=3, adjoint_cycles=3)
    serial = network.serial()
    copies = copy.deepcopy(network), pickle.loads(pickle.dumps(network))
    for net in (network, *copies, serial):
        trained(net, x, target)
    for net in (network, *copies):
        assert net.grid.mpi.size == WORLD.size
        with torch.no_grad():
            equal([net(x)], [serial(x)], 1e-5)
        net.bfloat16()(x.bfloat16()).sum().backward()
    for kind in (torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        gru = GRUParallel(WORLD, 3, 4, 24, 2, "classic", levels=2).to(kind)
        gru(torch.ones(2, 24, 3, dtype=kind)).sum().backward()
    torch.manual_seed(0)
    gru = GRUParallel(WORLD, 3, 4, 24, 2, "classic", levels=2, cycles=6, adjoint_cycles=6).double()
    x, alone = torch.randn(5, 24, 3, dtype=torch.float64), gru.serial()
    expected = gradients(alone, alone(x).square().sum())
    for net in (copy.deepcopy(gru), pickle.loads(pickle.dumps(gru)), AveragedModel(gru).module):
        equal(gradients(net, net(x).square().sum()), expected, 1e-10)  # summed over ranks


class Conditioned(nn.Linear):
    def forward(self, u, given):
        return torch.tanh(super().forward(u) + given["shift"][0])


def settings():
    """Settings, modes and running averages of norms and dropout, and arguments in dictionaries, are as on one rank."""
    x, found = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), []

    def block():
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.1))

    for comm in (MPI.COMM_SELF, WORLD):
        torch.manual_seed(0)
        network = LayerParallel(
            comm, block, 8, 2.0, coarsening="2", cycles=4, adjoint_cycles=4, serial="never"
        ).double()
        update_bn([x, 2 * x], network)
        for part in network.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.eval()
            if isinstance(part, nn.Dropout):
                part.p = 0.5
        shift = torch.ones(4, dtype=torch.float64, requires_grad=True)
        words = {"coarsening": "2", "cycles": 4, "adjoint_cycles": 4}
        other = LayerParallel(comm, lambda: Conditioned(4, 4), 8, 2.0, **words).double()
        by_shift = torch.autograd.grad(other(x, {"shift": [shift]}).square().sum(), shift)
        found.append([network(x).detach(), *by_shift, *network.full_state_dict().values()])
    equal(found[1], found[0], 1e-10)


def restarts():
    """A run that goes on from a checkpoint is the whole run, to the last bit; each rank has its random state again."""
    folder = WORLD.bcast(tempfile.mkdtemp() if WORLD.rank == 0 else None)

    def block(groups):
        norm = nn.LayerNorm if groups.data.size > 1 else nn.BatchNorm1d  # each group has running averages of its own
        return nn.Sequential(nn.Linear(4, 4), norm(4), nn.Tanh(), nn.Dropout(0.1))

    def training(groups, long_steps, epochs, **files):
        torch.manual_seed(1)
        words = {"coarsening": "2", "serial": "never", "long_steps": long_steps}
        layers = LayerParallel(groups.layers, partial(block, groups), 8, 2.0, **words)
        network = nn.Sequential(nn.Linear(2, 4), layers, nn.Linear(4, 5))
        torch.manual_seed(WORLD.rank)
        words = {"samples": 60, "batch": 20, "schedule": "constant", **files}
        words |= {"bias_every": 0} if long_steps == "fitted" else {}  # so few layers would go one after the other
        return Training(network, peaks(0), TrainingSettings(epochs=epochs, **words), groups)

    def taught(run):
        fit = run.network[1].solvers[0].fit
        return [] if fit is None else [fit.squares, fit.targets]

    half = max(WORLD.size // 2, 1)  # two groups, with samples and maps of their own
    for shared, long_steps in ((WORLD.size, "stages"), (half, "fitted"), (WORLD.size, "fitted")):
        found, groups = [], Groups(WORLD, shared)
        for epochs, files in ((3, {}), (2, {"checkpoint": f"{folder}/c"}), (3, {"restart": f"{folder}/c"})):
            run = training(groups, long_steps, epochs, **files)
            run.run()
            found.append([*run.network.state_dict().values(), torch.get_rng_state(), *taught(run)])
        assert all(map(torch.equal, found[0], found[2])) and not torch.equal(found[0][0], found[1][0])
        if shared < WORLD.size:
            maps = groups.data.allgather(taught(run))
            assert not torch.equal(maps[0][0], maps[1][0])
    same, alone = (
        training(each, "fitted", 2, restart=f"{folder}/c") for each in (groups, Groups(MPI.COMM_SELF))
    )  # on another number of ranks each takes the maps of its intervals
    equal(taught(alone), [torch.cat(WORLD.allgather(sums)) for sums in taught(same)], 0.0)
    WORLD.Barrier()
    if WORLD.rank == 0:
        shutil.rmtree(folder)


if __name__ == "__main__":
    if WORLD.size == 2:  # the compiled loop inside of intervals, and from rank to rank, where there is a compiler
        fusedchain.LEAST_WORK = 1
    for part in (
        layers,
        in_turn,
        cycles,
        given,
        unlike,
        splines,
        fitted,
        sequences,
        samples,
        manners,
        settings,
        restarts,
    ):
        try:
            part()
        except BaseException:
            traceback.print_exc()
            WORLD.Abort(1)
        WORLD.Barrier()
        if WORLD.rank == 0:
            print(f"{part.__name__}: same", flush=True)
