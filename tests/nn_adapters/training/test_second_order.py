"""Optimizers of second order in the training loop: by name and by instance, and what is refused."""

import math

import pytest
import torch
from torch import nn

from nn_adapters.curvature.hessianfree import HessianFree
from nn_adapters.curvature.kfac import KFAC
from nn_adapters.curvature.likelihoods import CrossEntropy
from nn_adapters.data.generated import peaks
from nn_adapters.layers.blocks import dense
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.training.loop import Training, TrainingSettings
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.settings import check

DATA = peaks(0)


def network(width=8):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))


def settings(**words):
    return TrainingSettings(**{**dict(epochs=3, samples=300, batch=50), **words})


@pytest.mark.parametrize("name", ["kfac", "hessian_free", "natural"])
def test_a_name_is_the_instance_that_it_stands_for(name, options):
    options(kfac_damping=0.05, hf_damping=0.05, natural_hf_damping=0.05)
    by_name = Training(network(), DATA, settings(optimizer=name))
    by_name.run()
    net = network()
    words = {} if name != "natural" else dict(backtrack=False, warm=0.0, precond="none", cg_rtol=0.1, cg_max_it=20)
    make = KFAC if name == "kfac" else HessianFree
    by_hand = Training(net, DATA, settings(), optimizer=make(net, CrossEntropy(), damping=0.05, **words))
    by_hand.run()
    assert [e.loss for e in by_hand.history] == [e.loss for e in by_name.history]
    assert by_name.history[-1].loss < 0.8 * by_name.history[0].loss
    assert by_name.history[-1].damping == by_name.optimizer.damping > 0.0


def test_the_schedule_is_that_of_a_rate_which_is_given():
    net = network()
    run = Training(net, DATA, settings(epochs=2), optimizer=KFAC(net, CrossEntropy(), rate=0.5))
    run.run()
    assert run.optimizer.coefficients == (0.5 * 0.5 * (1.0 + math.cos(math.pi / 2)), 0.9)


def test_regularization_of_layers_is_in_the_gradient():
    """With a weight beyond all else, steps lead to layers of zeros."""
    torch.manual_seed(0)
    layers = LayerParallel(None, lambda: dense(4), 4, coarsening="2")
    net = nn.Sequential(nn.Linear(2, 4), layers, nn.Linear(4, 5))
    size = float(torch.cat([stack.detach().reshape(-1) for stack in layers.stacks]).norm())
    run = Training(net, DATA, settings(epochs=6, tikhonov=1.0), optimizer=KFAC(net, CrossEntropy(), damping=1.0))
    run.run()
    assert float(torch.cat([stack.detach().reshape(-1) for stack in layers.stacks]).norm()) < 0.5 * size


def test_what_cannot_be_is_named():
    net = network()
    with pytest.raises(InputError, match="that of another network"):
        Training(network(), DATA, settings(), optimizer=KFAC(net, CrossEntropy()))
    with pytest.raises(InputError, match="Dropout in training mode"):
        Training(nn.Sequential(net, nn.Dropout(0.5)), DATA, settings(optimizer="kfac"))
    with pytest.raises(InputError, match=r"adam \| sgd \| adamw \| kfac"):
        check(settings(optimizer="newton"))


def test_a_loss_that_is_not_finite_says_where():
    net = network()
    with torch.no_grad():
        net[0].weight.fill_(torch.nan)
    with pytest.raises(SolveFailure, match=r"not finite, in epoch 1, batch 1 .*-restart"):
        Training(net, DATA, settings(optimizer="kfac")).run()
