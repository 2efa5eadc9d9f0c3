"""The squared loss of a PyTorch network as a sum of squares: for Levenberg-Marquardt, and all else that wants rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from nn_adapters.losses.network import NetworkLoss
from pdeopt.core.autodiff import curvature, jvp, pullback
from pdeopt.core.errors import InputError
from pdeopt.core.team import Team
from pdeopt.squares.residual import ENTRIES_AT_ONCE, ResidualFunction
from pdeopt.squares.rows import density, draw_rows
from pdeopt.squares.share import Share

#: What serves where a module cannot be differentiated sample by sample.
BY_PRODUCTS = "-lm_linear cg -lm_keep none -lm_coarse none, which takes products alone"


class NetworkSquares(ResidualFunction):
    """A `NetworkLoss` with `mse_loss` as |r|^2: the same value, gradients and Hessian products, and rows.

    Rows are (samples outputs)^-1/2 (network(x) - y), output after output, sample after sample, and then
    (tikhonov / 2)^1/2 theta. The Jacobian is found by `torch.func.vmap` over the samples, a gradient for each output;
    products with it are those of the network, for networks whose Jacobian does not fit. Layers in parallel have no
    Jacobian and no J d: take `serial_network`.

    Rows that are drawn (`-lm_resample_every`) are all rows of samples that are drawn; those of the regularization stay.

    Args:
        loss: of the network, its samples and targets; parameters are read and assigned by it.
        weights: of the samples in the mean, >= 0, (samples,); 1 by default.
        indices: of the samples among those of a whole that they were drawn from, int64.

    Raises:
        InputError: another loss than `mse_loss`, a part of one, targets that do not have the shape of the outputs.

    Example:
        >>> f = NetworkLoss(network, nn.functional.mse_loss, x, y)
        >>> result = LevenbergMarquardt(NetworkSquares(f)).minimize(f.parameters())
        >>> f.assign(result.design)
    """

    def __init__(self, loss: NetworkLoss, weights: Tensor | None = None, indices: Tensor | None = None) -> None:
        is_mean = isinstance(loss.loss, nn.MSELoss) and loss.loss.reduction == "mean"
        if loss.loss is not nn.functional.mse_loss and not is_mean:
            name = getattr(loss.loss, "__name__", type(loss.loss).__name__)
            raise InputError("loss of a sum of squares", name, "nn.functional.mse_loss")
        if loss.constant or not all(loss._free):
            raise InputError("loss of a sum of squares", "a part of one", "a loss by all parameters")
        with torch.no_grad():
            shape = loss._outputs(loss.parameters().to(loss.x.device, loss.precision), loss.x[:1]).shape[1:]
        if loss.y.shape[1:] != shape or not loss.y.is_floating_point():
            got = f"{loss.y.dtype} {tuple(loss.y.shape)}"
            raise InputError("targets of a sum of squares", got, f"real numbers, {(loss.samples, *shape)}")
        self.loss, self.outputs, self.data = loss, math.prod(shape), loss.samples * math.prod(shape)
        self.weights = torch.ones(loss.samples, dtype=torch.float64) if weights is None else weights.double()
        self.indices = torch.arange(loss.samples) if indices is None else indices
        self._root = (self.weights / self.data).sqrt().to(loss.x.device, loss.precision)
        price = (1.0 + self.outputs) * loss.costs.gradient
        costs = replace(loss.costs, jacobian=price, product=loss.costs.gradient)
        count = self.data + (loss.size if loss.tikhonov else 0)
        super().__init__(loss.size, count, loss.samples, costs, loss.tally)
        self._ridge, self._every = math.sqrt(0.5 * loss.tikhonov), torch.arange(count)

    # -- rows and derivatives ------------------------------------------------------------------------------------

    def _residual(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        own, flat = self._every if rows is None else rows, _flat(self.loss, x)
        with torch.no_grad():
            found = [self._part(samples)(flat)[places].double().cpu() for samples, places, _ in self._parts(own)]
        return torch.cat([*found, self._ridge * x[own[own >= self.data] - self.data]])[_back(own, self.data)]

    def _linearize(self, x: Tensor, rows: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        own, flat = self._every if rows is None else rows, _flat(self.loss, x)
        fits = out is not None and out.shape == (len(own), self.size) and out.dtype == torch.float64
        J = out if fits and out is not None else torch.empty(len(own), self.size, dtype=torch.float64)
        r = torch.empty(len(own), dtype=torch.float64)
        at_once = max(1, ENTRIES_AT_ONCE // (self.outputs * self.size))
        for samples, places, into in self._parts(own, at_once):
            by_sample, values = _by_sample(self.loss, self._root, flat, samples)
            J[into], r[into] = by_sample[places].double().cpu(), values[places].double().cpu()
        ridge = (own >= self.data).nonzero()[:, 0]
        J[ridge] = 0.0
        J[ridge, own[ridge] - self.data] = self._ridge
        r[ridge] = self._ridge * x[own[ridge] - self.data]
        return r, J

    def _jvp(self, x: Tensor, d: Tensor, rows: Tensor | None = None) -> Tensor:
        own, flat, along = self._every if rows is None else rows, _flat(self.loss, x), _flat(self.loss, d)
        found = [
            jvp(self._part(samples), (flat,), (along,))[places].double().cpu()
            for samples, places, _ in self._parts(own)
        ]
        return torch.cat([*found, self._ridge * d[own[own >= self.data] - self.data]])[_back(own, self.data)]

    def _vjp(self, x: Tensor, w: Tensor, rows: Tensor | None = None) -> Tensor:
        own, flat = self._every if rows is None else rows, _flat(self.loss, x)
        ridge = own >= self.data
        found = torch.zeros_like(x).index_add(0, own[ridge] - self.data, self._ridge * w[ridge])
        for samples, places, into in self._parts(own):
            cotangent = flat.new_zeros(len(samples) * self.outputs)
            cotangent.index_add_(0, places.to(flat.device), w[into].to(flat))
            found += pullback(self._part(samples), (flat,))[1](cotangent)[0].double().cpu()
        return found

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        flat = _flat(self.loss, x)
        value, g = self._ridge**2 * float(x @ x), 2.0 * self._ridge**2 * x
        for samples in torch.arange(self.samples).split(self.loss.chunk):
            r, back = pullback(self._part(samples), (flat,))
            value, g = value + float(r.double() @ r.double()), g + 2.0 * back(r)[0].double().cpu()
        return value, g

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        flat, along, found = _flat(self.loss, x), _flat(self.loss, d), 2.0 * self._ridge**2 * d
        for samples in torch.arange(self.samples).split(self.loss.chunk):
            rows, one = self._part(samples), flat.new_ones(())
            product = curvature(lambda theta, rows=rows: rows(theta).square().sum(), (flat,), one)
            found = found + product(along)[0].double().cpu()
        return found

    # -- samples -------------------------------------------------------------------------------------------------

    def subset(self, indices: Tensor) -> NetworkSquares:
        return NetworkSquares(self.loss.subset(indices), self.weights[indices], indices)

    def sample(
        self, x: Tensor, count: int, seed: int, floor: float = 0.5, candidates: int = 0, team: Team | None = None
    ) -> NetworkSquares:
        """A mean over samples with about `count` rows, more of those whose residuals are large at x."""
        pool = torch.arange(self.samples)
        if 0 < candidates < self.samples:
            pool = torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed))[:candidates]
        share = Share(team, len(pool))
        sizes = share.gather(share.call(lambda: _sizes(self.loss, x, pool[share.own])))
        self.tally.work += self.costs.value * len(pool) / self.samples
        chosen, weights = draw_rows(density([sizes], floor), -(-count // self.outputs), seed + 1)
        samples = pool[chosen]
        return NetworkSquares(self.loss.subset(samples), weights * self.weights[samples], samples)

    def sample_memory(self) -> dict[str, Tensor]:
        return {"samples": self.indices, "weights": self.weights}

    def recalled(self, memory: dict[str, Tensor]) -> NetworkSquares:
        return NetworkSquares(self.loss.subset(memory["samples"]), memory["weights"], memory["samples"])

    # -- which rows ----------------------------------------------------------------------------------------------

    def _part(self, samples: Tensor) -> Callable[[Tensor], Tensor]:
        """theta -> rows of all outputs of some samples, (k,)."""
        x, y, root = self.loss.x[samples], self.loss.y[samples], self._root[samples]

        def rows(flat: Tensor) -> Tensor:
            return (root[:, None] * (self.loss._outputs(flat, x) - y).flatten(1)).flatten()

        return rows

    def _parts(self, rows: Tensor, chunk: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Samples of the rows that are asked for, some at a time; the rows among all of these; and where they belong.

        Args:
            rows: as they are asked for, int64.
            chunk: samples at a time; by default those of the loss.
        """
        of_data = (rows < self.data).nonzero()[:, 0]
        for into in of_data.split((chunk or self.loss.chunk) * self.outputs) if len(of_data) else ():
            samples, which = (rows[into] // self.outputs).unique(return_inverse=True)
            yield samples, which * self.outputs + rows[into] % self.outputs, into


def _back(rows: Tensor, data: int) -> Tensor:
    """Where each of the rows is, once those of the data come first."""
    return (rows >= data).int().argsort(stable=True).argsort()


def _flat(loss: NetworkLoss, x: Tensor) -> Tensor:
    """Parameters, or a direction, as the network is evaluated."""
    return x.detach().to(loss.x.device, loss.precision)


def _sizes(loss: NetworkLoss, x: Tensor, samples: Tensor) -> Tensor:
    """Of the residuals of some samples, (k,)."""
    error = loss.predict(x, loss.x[samples]) - loss.y[samples] if len(samples) else loss.y[samples]
    return error.flatten(1).norm(dim=1).double().cpu()


def _by_sample(loss: NetworkLoss, root: Tensor, flat: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the Jacobian, and of r, of all outputs of some samples: (k, n) and (k,).

    Args:
        loss: of the network.
        root: factors of the rows of all samples.
        flat: parameters, (n,), as the network is evaluated.
        samples: which, int64.
    """

    def rows(flat: Tensor, x: Tensor, y: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        r = root * (loss._outputs(flat, x[None])[0] - y).flatten()
        return r, r

    try:
        J, r = vmap(jacrev(rows, has_aux=True), (None, 0, 0, 0))(flat, loss.x[samples], loss.y[samples], root[samples])
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        name = type(loss.network).__name__
        raise InputError("Jacobian of a network", f"{name}, which vmap cannot take", BY_PRODUCTS) from error
    return J.detach().flatten(0, 1), r.detach().flatten()
