"""What one call of a network gives to all its layers: arguments, a seed of dropout, buffers; and the layers' steps.

A block may be more than a function of features and parameters: it may drop entries, hold buffers, and normalize by the
batch. A `PreparedBlock` is a copy of it that is a function of these, too. Which rows of them a step needs, it knows by
the number of its layer, which stands in a control beside the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from nn_adapters.layers.batching import (
    LEGAL_BLOCK,
    Given,
    batched,
    each_buffer,
    exchanged,
    is_random,
    parameter_places,
    parts_of_encoders,
    share_dropped,
)
from nn_adapters.layers.blocks import Direct, SteppingBlock
from nn_adapters.layers.coarsening import add_scaled, two_stages
from nn_adapters.layers.densestep import DenseStep, is_dense
from nn_adapters.layers.parts.batchnorm import Statistics, is_batch_norm, note_batch_norms
from nn_adapters.layers.parts.context import autocast_state, is_capturing, outside_compilation, refuse_transforms
from nn_adapters.layers.parts.dropout import SeededDropout, layer_keys, seed_dropout
from nn_adapters.layers.parts.intervalfit import feature_axis
from nn_adapters.layers.parts.layerstep import AutogradStep, LayerStep, StepLength
from nn_adapters.layers.parts.stacking import Shelf, take_settings
from pdeopt.core.errors import InputError

#: Layers are numbered by a control that is so small that no measure of the weights sees it, and exact as a power of 2.
NUMBER = 2.0**-70

#: Arguments without which PyTorch's operations draw no random numbers.
_SWITCHES = ("p", "dropout", "dropout_p", "train", "training")


class PreparedBlock:
    """A copy of a block as a function of features, parameters, buffers and keys of dropout.

    Args:
        block: is left as it is.

    Attributes:
        block: the copy.
        norms: its batch norms, those that keep running averages.
        is_special: whether it may need more than features and parameters.
        serving: the copy where it does, else the block.
    """

    def __init__(self, block: nn.Module) -> None:
        copied = copy.deepcopy(block)
        seed_dropout(copied)
        self.block, self.norms = note_batch_norms(copied)
        originals = dict(block.named_modules(remove_duplicate=False))
        self._pairs = [(originals[name], part) for name, part in self.block.named_modules(remove_duplicate=False)]
        known, parts = parts_of_encoders(self.block), list(self.block.modules())
        self._dropping = [part for part in parts if type(part) is SeededDropout or id(part) in known]
        self._others = [part for part in parts if type(part) is nn.Dropout and id(part) not in known]
        is_seeded = any(isinstance(part, (nn.Dropout, SeededDropout)) for part in parts)
        self.is_special = is_seeded or next(block.buffers(), None) is not None
        self.serving = self.block if self.is_special else block

    def follow(self) -> dict[nn.Module, bool]:
        """Take the settings that the block has now.

        Returns:
            whether each part of the copy is in training.

        Raises:
            InputError: dropout where nothing could give it a seed.
        """
        for like, part in self._pairs:
            take_settings(part, like)
        if any(part.p > 0.0 and part.training for part in self._others):
            raise InputError("block of a network of layers", "Dropout inside of a layer that goes by vmap", LEGAL_BLOCK)
        return {part: like.training for like, part in self._pairs}

    @property
    def drops(self) -> bool:
        """Whether it drops entries as it is set now, or was by the last `follow`."""
        return any(part.training and share_dropped(part) > 0.0 for part in self._dropping)


@dataclass(frozen=True)
class GivenCall:
    """What one call of a network gives to all layers.

    Attributes:
        args: of the block.
        modes: whether the parts of the block are in training.
        seed: of dropout, see `draw_seed`; None for none.
        statistics: of batch norms, with the buffers of the layers of this rank; None where there are no buffers.
        begin: number of the first layer of this rank.
        rows: of the layers of this rank in what is stacked, where that is not all of them, (n_local,).
    """

    args: Sequence[Any] = ()
    modes: Mapping[nn.Module, bool] = field(default_factory=dict)
    seed: int | Tensor | None = None
    statistics: Statistics | None = None
    begin: int = 0
    rows: Tensor | None = None

    @cached_property
    def _flat(self) -> tuple[list[Any], Any]:
        """Tensors and all else among the arguments, also inside of lists and dictionaries, and their structure."""
        return tree_flatten(list(self.args))

    @cached_property
    def trained(self) -> list[int]:
        """Which of them get gradients, and come as shared parameters of the steps."""
        return [k for k, value in enumerate(self._flat[0]) if isinstance(value, Tensor) and value.requires_grad]

    @property
    def shared(self) -> list[Any]:
        """Those that get gradients."""
        return [self._flat[0][k] for k in self.trained]

    @property
    def numbered(self) -> bool:
        """Whether the last control has numbers of the layers."""
        return not (self.seed is None and self.statistics is None and self.rows is None)

    def split(self, theta: Sequence[Tensor], shared: Sequence[Tensor]) -> tuple[Sequence[Tensor], Given]:
        """The parameters of the layers, and what is given to them."""
        leaves = list(self._flat[0])
        for k, value in zip(self.trained, shared):
            leaves[k] = value
        args = tree_unflatten(leaves, self._flat[1])
        if not self.numbered:
            return theta, Given(args, modes=self.modes)
        *theta, numbers = theta
        layers = layer_numbers(numbers)
        given = Given(args, None if self.seed is None else layer_keys(self.seed, layers), modes=self.modes)
        if self.statistics is None:
            return theta, given
        rows = layers - self.begin if self.rows is None else self.rows[layers - self.begin]
        buffers = {name: buffer[rows] for name, buffer in self.statistics.buffers.items()}
        return theta, replace(given, buffers=buffers, note=partial(self.statistics.note, rows))


def draw_seed(mpi: Any, device: torch.device) -> int | Tensor:
    """A seed from PyTorch's generator on rank 0. Collective, and every rank's generator goes on alike.

    In a CUDA graph it is a number on the device, from the device's generator, which each replay draws anew.
    """
    if is_capturing():
        return torch.randint(1 << 62, (), device=device)
    return int(mpi.bcast(int(torch.randint(1 << 62, ()))))


def numbers_of(layers: range, device: torch.device) -> Tensor:
    """The control that numbers these layers, (layers,)."""
    return torch.arange(layers.start, layers.stop, device=device) * NUMBER


def layer_numbers(numbers: Tensor) -> Tensor:
    """The numbers of layers from their control, or from means of it over intervals, (layers,)."""
    return (numbers.detach() / NUMBER).round().long()


def layer_step(
    block: nn.Module, by_hand: bool = True, prepared: bool = False, call: GivenCall = GivenCall()
) -> LayerStep:
    """The step of layers like `block`, for many of them at once.

    Args:
        block: F of u + dt F(u), or `Direct(F)`.
        by_hand: whether dense blocks get derivatives by hand, which know nothing of autocast.
        prepared: whether it is that of a `PreparedBlock`.
        call: what is given besides features and parameters.

    Raises:
        InputError: another block with a `step` of its own, or one that is no function of features and parameters.
    """
    if by_hand and is_dense(block):
        return DenseStep(block)  # type: ignore[arg-type]
    changes_features = is_in_place(block)

    def own(u: Tensor) -> Tensor:  # what a block changes in place are the features of its own layer
        return u.clone() if changes_features else u

    many = batched(block, prepared)

    def value(u: Tensor, theta: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        parameters, given = call.split(theta, shared)
        return many(u, parameters, given)

    if isinstance(block, Direct):
        return AutogradStep(lambda u, theta, shared, dt: value(own(u), theta, shared), axis=feature_axis(block))
    if isinstance(block, SteppingBlock):
        raise InputError("block with a step of its own", type(block).__name__, "a block F of u + dt F(u), or Direct(F)")

    def step(u: Tensor, theta: Sequence[Tensor], shared: Sequence[Tensor], dt: StepLength) -> Tensor:
        u = own(u)
        return add_scaled(u, value(u, theta, shared), dt)

    def over(shortest: float, u: Tensor, theta: Sequence[Tensor], shared: Sequence[Tensor], dt: StepLength) -> Tensor:
        return two_stages(lambda v, rows: value(v, rows, shared), shortest, u, theta, dt)

    return AutogradStep(step, None if changes_features else over, axis=feature_axis(block))


def is_in_place(block: nn.Module) -> bool:
    """Whether a block may change the features that it gets."""
    return any(getattr(part, "inplace", False) for part in block.modules())


@outside_compilation
def in_series(places: Sequence[tuple[Shelf, int]], u: Tensor, args: Sequence[Any], dt: float) -> Tensor:
    """u_N, one layer after the other on this process: the blocks' own `forward`, and PyTorch's own gradients.

    Batch norms move their running averages. Blocks must not draw random numbers.

    Args:
        places: the shelf and the row of each layer.
        u: u_0.
        args: of the blocks.
        dt: length of a layer.
    """
    refuse_transforms()
    shelves = {id(shelf): shelf for shelf, _ in places}
    kinds = {key: (*_rows_in_series(shelf), is_in_place(shelf.template.module)) for key, shelf in shelves.items()}
    for shelf, row in places:
        block, (named, tensors, changes_features) = shelf.template.module, kinds[id(shelf)]
        u = u.clone() if changes_features else u
        value = exchanged(block, {name: tensors[k][row] for name, k in named}, (u, *args))
        u = (value if isinstance(block, Direct) else torch.add(u, value, alpha=dt)).to(u.dtype)
    return u


def _rows_in_series(shelf: Shelf) -> tuple[list[tuple[str, int]], list[Sequence[Tensor]]]:
    """The names of a block's parameters and buffers, and indices of their rows in the list that follows."""
    template, block = shelf.template, shelf.template.module
    parameters = template.find(shelf.stack)
    at = {id(buffer): len(parameters) + k for k, buffer in enumerate(block.buffers())}
    named = [*parameter_places(block), *((name, at[id(buffer)]) for name, buffer in each_buffer(block))]
    return named, [*(p.unbind() for p in parameters), *template.find_buffers(shelf.stack).values()]


@dataclass
class FirstLooks:
    """The dtypes of features after a block, by what is known of them before; each is looked at once.

    Args:
        shelf: with the layers of this rank; without any, those of another rank stand for them.
        dtypes: found so far.
    """

    shelf: Shelf
    dtypes: dict[tuple[Any, ...], torch.dtype] = field(default_factory=dict)

    def dtype(self, u: Tensor, args: Sequence[Any]) -> torch.dtype:
        """That of features between layers, by a call of one layer, which refuses what PyTorch refuses.

        Args:
            u: features before the layer.
            args: of the block.

        Raises:
            InputError: a block that changes the shape of features, or its buffers in another way than batch norms do;
                that draws random numbers by other means than modules, or uses a tensor from outside that is trained.
        """
        block, tensors = self.shelf.template.module, self.shelf.tensors()
        key = (
            *(u.shape, u.dtype, u.device),
            *[part.training for part in block.modules()],
            *[(s.dtype, s.device) for s in tensors],
            *[(v.shape, v.dtype) if isinstance(v, Tensor) else type(v) for v in (tree_leaves(args) if args else ())],
            *autocast_state(u.device.type).items(),
        )
        if key not in self.dtypes:
            value = self._look(u, args)
            if not isinstance(value, Tensor) or value.shape != u.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError("block", f"features {tuple(u.shape)} that become {got}", "features of the same shape")
            is_direct = isinstance(block, Direct)
            self.dtypes[key] = value.dtype if is_direct else torch.promote_types(u.dtype, value.dtype)
        return self.dtypes[key]

    def _look(self, u: Tensor, args: Sequence[Any]) -> Any:
        """What a layer makes of these features; changes of buffers that would be lost are refused."""
        template = self.shelf.template
        block = template.module
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            rows = [t[0].detach() if len(t) else t.new_zeros(t.shape[1:]) for t in self.shelf.tensors()]
            buffers = [row.clone() for row in rows[len(template.names) :]]
            at = {id(buffer): k for k, buffer in enumerate(block.buffers())}
            places = {name: at[id(buffer)] for name, buffer in each_buffer(block)}
            given = {name: rows[k] for name, k in parameter_places(block)}
            given |= {name: buffers[k] for name, k in places.items()}
            own = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, (u, *args))
            with torch.enable_grad(), _Draws() as draws:
                value = exchanged(block, given, own)
            _refuse_what_is_hidden(block, value, draws.names)
        norms = {name for name, part in block.named_modules() if is_batch_norm(part)}
        for name, k in places.items():
            norm, _, leaf = name.rpartition(".")
            changes = buffers[k]._version
            if norm in norms and leaf == "num_batches_tracked" and changes > 1:
                raise InputError("block", f"{changes} calls of the batch norm {norm!r}", "one call")
            if norm not in norms and (changes or given[name] is not buffers[k]):
                raise InputError("block", f"a buffer {name} that a call changes", "constants, or those of nn.BatchNorm")
        return value


class _Draws(TorchDispatchMode):
    """Notes operations that draw random numbers, in this thread and on any device; generators have all threads'.

    Attributes:
        names: of these operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), words: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in function.tags and not _is_off(function, args, words or {}):
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(words or {}))


def _is_off(function: Any, args: Sequence[Any], words: Mapping[str, Any]) -> bool:
    """Whether an operation that may draw does not: attention and sequences with a share of zero, or not in training."""
    arguments = function._schema.arguments
    values = {each.name: each.default_value for each in arguments if each.has_default_value()}
    values |= dict(zip((each.name for each in arguments), args)) | words
    return any(isinstance(values.get(name), (bool, float)) and not values[name] for name in _SWITCHES)


def _refuse_what_is_hidden(block: nn.Module, value: Any, draws: Sequence[str]) -> None:
    """Raise where a block has used what a solve could not give to it, or not twice in the same way."""
    if isinstance(value, Tensor) and value.requires_grad:  # all that was given needs none
        got = f"{type(block).__name__} that uses a tensor from outside which needs gradients"
        raise InputError("block", got, "parameters of its own, or further arguments of the call")
    if draws and not any(is_random(part) for part in block.modules()):
        got = f"{type(block).__name__} that draws random numbers by {draws[0]}"
        raise InputError("block of a layer-parallel network", got, LEGAL_BLOCK)
