"""Kronecker factors of all layers of a network: sums over samples, averaged over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.curvature.layers import CurvedLayer, NormCurved
from nn_adapters.curvature.likelihoods import Likelihood
from pdeopt.core.errors import InputError
from pdeopt.functions.gram import GramSum
from pdeopt.lowrank.kronecker import KroneckerBlocks

FISHER = ("exact", "sampled", "empirical")


class KroneckerFactors:
    """E aa' and E gg' of each layer: with them, the Fisher matrix of the loss is about diag(G (x) A).

    - fisher "exact": G is the sum over the columns of H, one backward pass for each output; the Gauss-Newton matrix.
    - "sampled": one backward pass, for targets that the network draws; the same in the mean.
    - "empirical": one, for the targets of the data; another matrix, which is small where the loss is.

    Where a layer has several positions T or uses, A is the mean over them and G the sum ("expand": R. Eschenhagen,
    A. Immer, R. E. Turner, F. Schneider, P. Hennig, Kronecker-factored approximate curvature for modern neural network
    architectures, NeurIPS 2023). Dense blocks of normalization layers are exact.

    Args:
        network: whose outputs of a sample depend on that sample.
        layers: `curved_layers(network)`.
        likelihood: of the loss.
        fisher: as above.
        generator: of sampled targets.

    Attributes:
        sums: A and G of each layer, as running sums.

    Raises:
        InputError: another kind of Fisher matrix.

    Example:
        >>> factors = KroneckerFactors(network, curved_layers(network), CrossEntropy())
        >>> factors.average([(x,)])
        >>> factors.blocks().solve(gradient, damping=1e-2)
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[CurvedLayer],
        likelihood: Likelihood,
        fisher: str = "exact",
        generator: torch.Generator | None = None,
    ) -> None:
        if fisher not in FISHER:
            raise InputError("Fisher matrix", fisher, " | ".join(FISHER))
        self.network, self.layers, self.likelihood = network, list(layers), likelihood
        self.fisher, self.generator = fisher, generator
        self.sums = self._empty()

    def average(self, inputs: Sequence[tuple[Any, ...]], targets: Sequence[Any] = (), forget: float = 0.0) -> None:
        """Take a batch into the averages.

        Args:
            inputs: arguments of the network, of each part of the batch.
            targets: of each part, for the empirical Fisher matrix.
            forget: factor of the weights of all batches so far.
        """
        fresh = self.fresh(inputs, targets)
        for own, new in zip(self.sums, fresh):
            for a, b in zip(own, new):
                a.forget(forget)
                a.merge(b)

    def fresh(self, inputs: Sequence[tuple[Any, ...]], targets: Sequence[Any] = ()) -> list[tuple[GramSum, GramSum]]:
        """The sums of one batch alone, as `average`."""
        if self.fisher == "empirical" and len(targets) != len(inputs):
            got = f"{len(targets)} for {len(inputs)} parts of a batch"
            raise InputError("targets of the empirical Fisher matrix", got, "a loss computed by the likelihood itself")
        sums, samples = self._empty(), sum(len(arguments[0]) for arguments in inputs)
        for number, arguments in enumerate(inputs):
            self._add(sums, arguments, targets[number] if self.fisher == "empirical" else None, samples)
        return sums

    def blocks(self) -> KroneckerBlocks:
        """The averages as a matrix."""
        A = [
            _mean(a) if not layer.is_dense else torch.ones_like(a.lower)
            for layer, (a, _) in zip(self.layers, self.sums)
        ]
        return KroneckerBlocks(A, [_mean(g) for _, g in self.sums])

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""
        found: dict[str, Any] = {}
        for number, pair in enumerate(self.sums):
            for kind, sums in zip("AG", pair):
                found[f"{kind}{number}"] = sums.lower.tril()
                found[f"weight.{kind}{number}"] = sums.weights[0]
        return found

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""
        for number, pair in enumerate(self.sums):
            for kind, sums in zip("AG", pair):
                sums.lower.copy_(memory[f"{kind}{number}"])
                weight = float(memory[f"weight.{kind}{number}"])
                sums.weights = weight, weight

    def _empty(self) -> list[tuple[GramSum, GramSum]]:
        return [tuple(GramSum(k, 0, p.dtype) for k in reversed(layer.shape)) for layer, p in self._firsts]  # type: ignore[misc]

    @property
    def _firsts(self) -> Iterator[tuple[CurvedLayer, Tensor]]:
        return ((layer, layer.parameters[0]) for layer in self.layers)

    def _add(self, sums: list[tuple[GramSum, GramSum]], arguments: tuple[Any, ...], targets: Any, whole: int) -> None:
        """Sums of a part of a batch of `whole` samples."""
        uses: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]
        with torch.enable_grad(), recorded(self.layers, uses):
            outputs = with_buffers(self.network)(*arguments)
        detached = outputs.detach()
        if self.fisher == "exact":
            cotangents = self.likelihood.columns(detached)
        elif self.fisher == "sampled":
            cotangents = [self.likelihood.sample(detached, self.generator)]
        else:
            cotangents = [self.likelihood.gradient(detached, targets)]
        samples = len(outputs)
        unit = (whole * self.likelihood.weight(whole)) ** 0.5
        for layer, made, (A, _) in zip(self.layers, uses, sums):
            for x, _ in made if not layer.is_dense else ():
                A.add(layer.inputs(x).flatten(0, 1))
        made = [y for each in uses for _, y in each]
        for number, cotangent in enumerate(cotangents):
            keep = number + 1 < len(cotangents)
            found = torch.autograd.grad(outputs, made, cotangent, retain_graph=keep, allow_unused=True)
            derivatives = iter(torch.zeros_like(y) if g is None else g for g, y in zip(found, made))
            for layer, each, (_, G) in zip(self.layers, uses, sums):
                rows = _rows(layer, [(x, next(derivatives)) for x, _ in each], samples)
                G.add(unit * rows, samples=samples if number == 0 else 0)


def _rows(layer: CurvedLayer, uses: list[tuple[Tensor, Tensor]], samples: int) -> Tensor:
    """The rows that G is the sum of, for as many samples."""
    if isinstance(layer, NormCurved):
        parts = [layer.gradients(layer.inputs(x), g) for x, g in uses]
        return torch.stack(parts).sum(0) if parts else torch.zeros(samples, layer.shape[0])
    if not uses:
        return torch.zeros(samples, layer.shape[0])
    rows = torch.cat([layer.derivatives(g) for _, g in uses], 1)
    return rows.flatten(0, 1)


def _mean(sums: GramSum) -> Tensor:
    return sums.gram / (sums.weights[0] or 1.0)


@contextmanager
def recorded(layers: Sequence[CurvedLayer], uses: list[list[tuple[Tensor, Tensor]]]) -> Iterator[None]:
    """Inside, what each layer is called with and returns is kept, (inputs, outputs) of each use."""

    def hook(number: int) -> Callable[..., Tensor]:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            uses[number].append((arguments[0].detach(), output))
            return output.clone()  # what follows may change it in place

        return keep

    handles = [layer.module.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_buffers(network: nn.Module) -> Callable[..., Tensor]:
    """The network with copies of its buffers: running means stay as they are."""
    copies = {name: buffer.clone() for name, buffer in network.named_buffers()}

    def call(*arguments: Any) -> Tensor:
        return torch.func.functional_call(network, copies, arguments)  # type: ignore[no-any-return]

    return call
