"""How layers are dealt out, what is counted without ranks, and what is refused."""

from itertools import combinations, pairwise

import pytest
import torch
from mpi4py import MPI
from torch import nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.parallel.counts import direct_sum, halo_traffic, pipeline_idle, rabenseifner_sum, two_level_sum
from nn_adapters.parallel.pipeline import require_alone, require_pipeline, stages


@pytest.mark.parametrize("costs, ranks", [([3, 1, 4, 1, 5, 9, 2, 6], 3), ([0, 0, 7, 0], 4), ([1.0] * 6, 1)])
def test_no_cut_has_a_cheaper_dearest_stage(costs, ranks):
    def dearest(ends):
        return max(sum(costs[a:b]) for a, b in ends)

    cuts = combinations(range(1, len(costs)), ranks - 1)
    found = stages(costs, ranks)
    assert all(a < b for a, b in found) and len(found) == ranks
    assert dearest(found) == min(dearest(list(pairwise((0, *cut, len(costs))))) for cut in cuts)


def test_sums_in_two_levels_send_fewer_messages_and_bytes_between_nodes():
    """Of 64 nodes of 8 ranks: the bytes between nodes are those of one rank of a node, shared by all."""
    flat, levels = direct_sum(8e6, 512), two_level_sum(8e6, 8, 64)
    assert levels.between == rabenseifner_sum(1e6, 64) and levels.between.messages == 12
    assert levels.between.bytes < flat.bytes / 8
    assert levels.inside + levels.between == rabenseifner_sum(1e6, 64) + direct_sum(8e6, 8)
    assert (levels + levels).between.seconds(1e-6, 1e9) == 24e-6 + 2 * levels.between.bytes / 1e9
    assert rabenseifner_sum(100.0, 1).messages == 0 and rabenseifner_sum(100.0, 6).messages == 5
    assert pipeline_idle(4, 9) == 0.25 and halo_traffic(10.0, 3).bytes == 40.0


SHARED = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: require_pipeline(nn.Linear(2, 2), 1), "nn.Sequential"),
        (lambda: require_pipeline(nn.Sequential(nn.Linear(2, 2)), 2), "at most the 1"),
        (lambda: require_pipeline(nn.Sequential(nn.BatchNorm1d(2)), 1), "know no batches"),
        (lambda: require_alone([[("0", SHARED)], [("1", nn.ReLU()), ("2", SHARED)]]), "2, with weights of another"),
        (lambda: nna.Pipeline(nn.Sequential(SHARED), MPI.COMM_SELF, schedule="serial"), "1f1b | gpipe"),
        (lambda: nna.Pipeline(nn.Sequential(SHARED), MPI.COMM_SELF, 0), "integer >= 1"),
        (lambda: nna.Pipeline(nn.Sequential(SHARED), MPI.COMM_SELF, costs=[1, 2]), "1 numbers"),
        (lambda: nna.DomainParallel(nn.Sequential(nn.BatchNorm2d(2)), MPI.COMM_SELF), "BatchNorm2d"),
        (lambda: nna.DomainParallel(nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), MPI.COMM_SELF), "ceil_mode"),
        (
            lambda: nna.DomainParallel(nn.Sequential(nn.Conv2d(1, 1, 3, padding_mode="circular")), MPI.COMM_SELF),
            "circular",
        ),
        (lambda: nna.Groups(MPI.COMM_SELF, layers=2), "divides the 1 ranks"),
        (lambda: nna.Groups(MPI.COMM_SELF, domain=3), "divides the 1 ranks"),
        (lambda: nna.TwoLevelSums(MPI.COMM_SELF, 2), "0 ... 1"),
        (lambda: nna.GradientSums(SHARED, MPI.COMM_SELF, "int8"), "float16"),
        (lambda: nna.GradientSums(SHARED, MPI.COMM_SELF, reduce="max"), "mean | sum"),
        (lambda: nna.GradientSums(SHARED, MPI.COMM_SELF, delay=-1), "at least 0"),
        (lambda: nna.GradientSums(SHARED, MPI.COMM_SELF, "bfloat16", node_size=0), "that of the gradients"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(po.InputError, match=words.replace("|", r"\|")):
        make()


def test_a_batch_of_no_samples_is_refused():
    network = nn.Linear(2, 2)
    sums = nna.GradientSums(network, MPI.COMM_SELF)
    sums.samples = 0
    with pytest.raises(po.InputError, match="none on all ranks"):
        sums.finish()
    sums.samples = 2
    network(torch.ones(2, 2)).mean().backward()
    expected = [p.grad.clone() for p in network.parameters()]
    sums.finish()
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), expected))
