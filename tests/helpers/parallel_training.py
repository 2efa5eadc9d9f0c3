"""What the tests of parallel training run on several ranks: `mpiexec -n N python -m tests.helpers.parallel_training`.

Each part is compared with the serial network on every rank.
"""

from __future__ import annotations

import copy
import sys
from itertools import pairwise

import torch
from mpi4py import MPI
from petsc4py import PETSc  # noqa: F401  it starts on all ranks together
from torch import nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.parallel.counts import direct_sum, two_level_sum

WORLD = MPI.COMM_WORLD
SAMPLES, RATE, STEPS = 24, 0.5, 4


def plain():
    torch.manual_seed(0)
    sizes = (5, 40, 40, 3)
    return nn.Sequential(*(part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh()))).double()


def batch():
    x = torch.randn(SAMPLES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x, torch.arange(SAMPLES) % 3


def own():
    """The samples of this rank: unequal shares."""
    return slice(WORLD.rank**2, (WORLD.rank + 1) ** 2 if WORLD.rank + 1 < WORLD.size else None)


def gradients(network):
    return [p.grad for p in network.parameters()]


def train(network, x, y, sums=None, delay=0):
    """Some steps; without sums by gradients of all samples that are `delay` steps old."""
    optimizer, old = torch.optim.SGD(network.parameters(), RATE, momentum=0.9), []
    for step in range(STEPS):
        optimizer.zero_grad()
        if sums is not None:
            sums.samples = len(x)
        nn.functional.cross_entropy(network(x), y).backward()
        if sums is not None:
            sums.finish()
        else:
            old.append(gradients(network))
            for p, g in zip(network.parameters(), old[step - delay] if step >= delay else [None] * 99):
                p.grad = g
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


def close(found, expected, tolerance=1e-13):
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, float(error)


def same_on_all(found):
    assert all(torch.equal(found, each) for each in WORLD.allgather(found))


def raises(error, words, function):
    """On all ranks."""
    try:
        function()
    except error as found:
        assert words in str(found), str(found)
    else:
        raise AssertionError(f"no {error.__name__}")


def gradient_sums():
    """Steps of all samples, whatever the messages; what is late is late on all ranks."""
    x, y = batch()
    expected = train(plain(), x, y)
    for words, tolerance in (
        ({}, 1e-13),
        ({"bucket": 100}, 1e-13),
        ({"node_size": 0}, 1e-13),
        ({"node_size": min(2, WORLD.size), "bucket": 500}, 1e-13),
        ({"precision": "bfloat16"}, 1e-3),
        ({"precision": "float16", "bucket": 500}, 1e-4),
    ):
        network = plain()
        sums = nna.GradientSums(network, WORLD, **words)
        found = train(network, x[own()], y[own()], sums)
        close(found, expected, tolerance)
        same_on_all(found)
        if "node_size" not in words and "precision" not in words:
            sent = WORLD.allreduce(sums.sent)
            count = direct_sum(found.numel() * 8, WORLD.size)
            weights = sums.sends / 2 * 8  # that of the samples, in each message of the first half
            assert sent == round(STEPS * WORLD.size * count.bytes) + WORLD.allreduce(weights)
            assert sums.sends == STEPS * count.messages * (5 if words else 1)  # buckets
        sums.close()
    for delay in (1, 2):
        network = plain()
        found = train(network, x[own()], y[own()], nna.GradientSums(network, WORLD, delay=delay, bucket=1000))
        close(found, train(plain(), x, y, delay=delay))


def gradients_leave_early():
    """When the backward pass comes to the first layer, those of the other layers are on their way."""
    network, seen = plain(), []
    x, y = batch()
    sums = nna.GradientSums(network, WORLD, bucket=1)
    network[1].register_full_backward_hook(lambda *arguments: seen.append(sums.begun))
    nn.functional.cross_entropy(network(x), y).backward()
    assert seen == [4] and sums.begun == 6
    raises(po.InputError, "one more", lambda: network(x).sum().backward())
    sums.finish()
    for p in network.parameters():
        p.grad = None
    with sums.waiting():
        nn.functional.cross_entropy(network(x), y).backward()
    nn.functional.cross_entropy(network(x), y).backward()
    sums.finish()
    twice = gradients(network)
    sums.close()
    network.zero_grad()
    nn.functional.cross_entropy(network(x), y).backward()
    for found, g in zip(twice, gradients(network)):
        close(found, 2 * g)


def failures():
    """What is wrong on one rank is named on all."""
    last = WORLD.rank == WORLD.size - 1
    network = plain()
    sums = nna.GradientSums(network, WORLD)
    (network(batch()[0]).sum() * (torch.nan if last else 1.0)).backward()
    raises(po.SolveFailure, f".bias is not finite on rank {WORLD.size - 1}", sums.finish)
    other = plain()
    with torch.no_grad():
        other[0].weight[0, 0] += last
    if WORLD.size == 1:
        return
    raises(po.InputError, f"others on rank {WORLD.size - 1}", lambda: nna.GradientSums(other, WORLD))
    nna.share_weights(other, WORLD)
    nna.GradientSums(other, WORLD).samples = 0.0
    wide = nn.Linear(3, 3 + last)
    raises(po.InputError, "weight: ((4, 3)", lambda: nna.GradientSums(wide, WORLD))


def two_levels():
    """As an allreduce, the same on all ranks, and as many messages and bytes as are counted."""
    for node_size in (0, 1, 2, 3):
        if node_size > WORLD.size:
            continue
        sums = nna.TwoLevelSums(WORLD, node_size)
        x = torch.randn(1200 * 5 - 1, generator=torch.Generator().manual_seed(WORLD.rank), dtype=torch.float64)
        first, second = sums.begin_sum(x, 2.0, tag=0), sums.begin_sum(3 * x, tag=1)
        close(second.finish()[0], 3 * torch.from_numpy(WORLD.allreduce(x.numpy())))
        total, weight = first.finish()
        assert weight == 2.0 * WORLD.size
        close(total, torch.from_numpy(WORLD.allreduce(x.numpy())))
        same_on_all(total)
        if node_size and WORLD.size % node_size == 0:
            count = two_level_sum(2 * 6000 * 8, node_size, WORLD.size // node_size)
            for sent, counted in ((sums.traffic.inside, count.inside), (sums.traffic.between, count.between)):
                assert WORLD.allreduce(sent.messages, MPI.MAX) == 2 * counted.messages
                assert WORLD.allreduce(sent.bytes, MPI.MAX) == counted.bytes


def groups():
    """Each rank has one place; layers in parallel with samples shared by groups are the serial network."""
    shared = 2 if WORLD.size % 2 == 0 else 1
    box = nna.Groups(WORLD, layers=shared)
    assert box.shape == (WORLD.size // shared, shared, 1) == (box.data.size, box.layers.size, box.domain.size)
    assert nna.Groups(WORLD, layers=0, domain=shared).shape == (1, WORLD.size // shared, shared)
    x, y = batch()
    assert torch.equal(torch.cat(box.data.allgather(box.rows(x))).sort(0)[0], x.sort(0)[0])

    def network(comm):
        torch.manual_seed(1)
        layers = nna.LayerParallel(comm, lambda: nna.dense(5, act="tanh"), 16, 1.0, coarsening="4")
        return nn.Sequential(nn.Linear(5, 5), layers, nn.Linear(5, 3)).double()

    hybrid, serial = network(box.layers), nna.serial_network(network(MPI.COMM_SELF))
    sums = nna.GradientSums(hybrid, box.data, bucket=300)
    optimizers = [torch.optim.Adam(each.parameters(), 0.01) for each in (hybrid, serial)]
    for _ in range(3):
        for each, optimizer in zip((hybrid, serial), optimizers):
            optimizer.zero_grad()
            mine = [part if each is serial else box.rows(part) for part in (x, y)]
            sums.samples = len(mine[0])
            with nna.exactly(each):
                nn.functional.cross_entropy(each(mine[0]), mine[1]).backward()
            if each is hybrid:
                sums.finish()
            optimizer.step()
    with torch.no_grad():
        close(hybrid.eval()(x), serial(x), 1e-10)


def image_network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 20)),
        *(nn.LayerNorm(20), nn.Tanh(), nn.Linear(20, 4)),
    ).double()


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def pipeline():
    """Loss, gradients and outputs of the serial network, and as few micro-batches at once as the schedule promises."""
    x, y, serial = images(23, 1, 6, 6), torch.arange(23) % 4, image_network()
    value = nn.functional.cross_entropy(serial(x), y)
    value.backward()
    expected = {name: p.grad for name, p in serial.named_parameters()}
    for schedule, microbatches in (("1f1b", 5), ("gpipe", 5), ("1f1b", 30)):
        pipe = nna.Pipeline(image_network(), WORLD, microbatches, schedule)
        assert abs(pipe.step(x, y, nn.functional.cross_entropy) - float(value.detach())) <= 1e-14
        for name, p in pipe.stage.named_parameters():
            close(p.grad, expected[name])
        micro = min(microbatches, 23)
        assert pipe.held == (micro if schedule == "gpipe" else min(pipe.ranks - pipe.rank, micro))
        assert pipe.sends == micro * ((pipe.rank > 0) + (pipe.rank < pipe.ranks - 1))
        assert torch.equal(pipe(x), serial(x).detach())
        state = pipe.full_state_dict()
        assert list(state) == list(serial.state_dict())
        pipe.load_state_dict({key: 2.0 * each for key, each in state.items()})
        assert all(torch.equal(each, 2.0 * state[key]) for key, each in pipe.stage.state_dict().items())
    raises(po.SolveFailure, "is nan", lambda: pipe.step(torch.nan * x, y, nn.functional.cross_entropy))
    if WORLD.size % 2 == 0:
        box = nna.Groups(WORLD, layers=2)
        pipe = nna.Pipeline(image_network(), box.layers, 4)
        sums = nna.GradientSums(pipe.stage, box.data, passes=4, bucket=100)
        sums.samples = len(box.rows(x))
        pipe.step(box.rows(x), box.rows(y), nn.functional.cross_entropy)
        assert sums.begun > 0
        sums.finish()
        for name, p in pipe.stage.named_parameters():
            close(p.grad, expected[name])


def bodies():
    """Strides, dilation, groups, any padding, windows that reach over several ranks."""
    torch.manual_seed(0)
    pooled = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    yield nn.Sequential(*pooled, nn.Conv2d(4, 4, 5, stride=2, padding=2, groups=2), nn.Tanh())
    inner = nn.Sequential(nn.Conv2d(4, 3, 4, padding="same", bias=False), nn.GELU())
    yield nn.Sequential(nn.Conv2d(2, 4, (5, 3), dilation=(3, 1), padding=(6, 1)), nn.AvgPool2d(2, padding=1), inner)
    yield nn.Sequential(nn.Conv2d(2, 3, 9, padding="same", dilation=2), nn.Conv2d(3, 2, 1, stride=2))


def domain():
    """Features, gradients of weights and of images are those of the serial network, the same on all ranks."""
    for body in bodies():
        body.double()
        split = nna.DomainParallel(copy.deepcopy(body), WORLD)
        x = images(3, 2, 19, 11).requires_grad_()
        other = x.detach().clone().requires_grad_()
        outputs, found = body(x), split(other)
        weights = images(*outputs.shape)
        (outputs * weights).sum().backward()
        (found * weights).sum().backward()
        close(found.detach(), outputs.detach())
        for p, q in zip((x, *body.parameters()), (other, *split.parameters())):
            close(q.grad, p.grad)
            same_on_all(q.grad)
    if WORLD.size > 1:
        assert split.sent > 0
        raises(po.InputError, "at most its 1 rows", lambda: split(images(1, 2, 1, 5)))


def windows():
    """Weights are the sum of all pushes, on all ranks; what is not finite ends all, whoever waits where."""
    torch.manual_seed(WORLD.rank)
    network = nn.Linear(4, 3)
    server = nna.WeightServer(network, WORLD)
    first = WORLD.bcast(torch.nn.utils.parameters_to_vector(network.parameters()).detach())
    for k in range(5):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(1.0 + WORLD.rank)
        server.push()
        if k < 4:
            server.pull()
    server.finish()
    found = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    close(found, first + 5.0 * WORLD.size * (WORLD.size + 1) / 2, 1e-5)
    same_on_all(found)
    late = [each for own in WORLD.allgather(server.staleness) for each in own]
    assert len(late) == 5 * WORLD.size and min(late) >= 0 and max(late) < 5 * WORLD.size
    assert server.sends == 11 * (WORLD.size - 1)  # 6 pulls and 5 pushes
    WORLD.Barrier()
    last = WORLD.size - 1

    def broken():
        if WORLD.rank == last:
            with torch.no_grad():
                network.bias[0] = torch.nan
            server.push()
        server.finish()

    raises(po.SolveFailure, f"rank {last} is not finite", broken)
    WORLD.Barrier()
    server.close()


PARTS = [gradient_sums, gradients_leave_early, failures, two_levels, groups, pipeline, domain, windows]


def rank_is_lost():
    """The last rank raises in a backward pass, while the others wait for its gradients."""
    network = plain()
    sums = nna.GradientSums(network, WORLD, bucket=1)
    if WORLD.rank == WORLD.size - 1:
        network[1].register_full_backward_hook(lambda *arguments: 1 / 0)
    network(batch()[0]).sum().backward()
    sums.finish()


if __name__ == "__main__":
    for part in [rank_is_lost] if "lost" in sys.argv else PARTS:
        part()
