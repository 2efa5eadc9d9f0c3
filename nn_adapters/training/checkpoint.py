"""Checkpoints of a training run: parameters, buffers, the optimizer's state, random states, in the one checked format.

A file does not depend on the ranks: the rows of layer-parallel parameters are gathered when it is written, and each
rank takes its own when it is read; so it is with what long steps have learned, which each group of ranks that shares
the layers has from samples of its own. What optimizers of second order remember is that of each rank, and goes to
others by layers. See `pdeopt.core.storage` for the format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.curvature.memories import recall_whole, whole_memory
from nn_adapters.curvature.secondorder import SecondOrder
from nn_adapters.layers.layer_mgrit import LayerMgrit
from nn_adapters.layers.parallelmodule import ParallelModule, mgrit_solvers
from nn_adapters.layers.parts.intervalfit import IntervalFit
from nn_adapters.layers.parts.splines import spline_coefficients
from nn_adapters.layers.parts.stacking import ParameterStack, Shelf
from nn_adapters.layers.stackedlayers import StackedLayers
from pdeopt.core.errors import InputError, on_root
from pdeopt.core.storage import read_tensors, write_tensors

#: What names of tensors begin with that are no parameter, buffer or state.
RANDOM, HISTORY, MEMORY, FIT = "random.", "history.", "memory.", "fit."

#: The sums that fitted long steps have learned.
FITTED = "squares", "targets"


def save_checkpoint(
    path: str,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    comm: Any,
    fingerprint: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    history: Tensor | None = None,
) -> None:
    """Write a checkpoint, in one piece or not at all. Collective.

    Args:
        path: of the file, which is replaced.
        network: whose parameters and buffers, those of this rank.
        optimizer: whose state of each parameter, or memory.
        comm: communicator of all ranks of the run.
        fingerprint: what must be equal where it is read, as JSON values.
        run: what else is known of the run, as JSON values.
        history: (epochs, numbers), which need not be finite.

    Raises:
        OSError: the file cannot be written; the old one is as it was.
        SolveFailure: weights that are not finite; the old file is as it was.
    """
    whole, numbers, shelves = {}, {}, _shelves(network)
    for name, value in _tensors(network, optimizer).items():
        if not torch.is_tensor(value):
            numbers[name] = value
            continue
        mpi, _ = shelves.get(_parts(name)[2], (None, None)) if value.dim() > 0 else (None, None)
        parts = [value.cpu()] if mpi is None else mpi.gather(value.cpu())
        whole[name] = value.cpu() if parts is None else torch.cat(parts) if mpi is not None else parts[0]
    if isinstance(optimizer, SecondOrder):
        for name, value in whole_memory(optimizer, comm).items():
            (whole if torch.is_tensor(value) else numbers)[f"{MEMORY}{name}"] = value
    whole |= _whole_fits(network, comm)
    states = comm.gather(torch.get_rng_state())
    whole[f"{RANDOM}cpu"] = torch.stack(states) if states else torch.empty(0)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        whole[f"{RANDOM}cuda"] = torch.cuda.get_rng_state()
    whole[f"{HISTORY}epochs"] = torch.empty(0) if history is None else history
    text = {"fingerprint": {"network": describe(network, optimizer), **(fingerprint or {})}, "numbers": numbers}
    on_root(comm, lambda: write_tensors(path, whole, {**text, "run": run or {}}))


def load_checkpoint(
    path: str,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    comm: Any,
    fingerprint: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """Give the network, the optimizer and PyTorch's generator what a checkpoint holds. Collective.

    Every parameter, buffer and state is in the file, none is too many, all are finite, of the right shape and type;
    what the network has is changed only where all is right.

    Args:
        path: of the file, written on any number of ranks.
        network, optimizer: of the same kind as those that were saved.
        comm: communicator of all ranks of the run.
        fingerprint: as it was written.

    Returns:
        `run` and `history`, as they were written.

    Raises:
        InputError: a file that is no checkpoint, a damaged one, or one of another network, optimizer or run.
    """
    print_of = {**(fingerprint or {}), "network": describe(network, optimizer)}
    stored, text = on_root(comm, lambda: read_tensors(path, print_of))
    history, states = stored.pop(f"{HISTORY}epochs"), stored.pop(f"{RANDOM}cpu")
    cuda = stored.pop(f"{RANDOM}cuda", None)
    fits = {name: stored.pop(name) for name in list(stored) if name.startswith(FIT)}
    found: dict[str, Any] = {**stored, **text["numbers"]}
    memory = {name.removeprefix(MEMORY): found.pop(name) for name in list(found) if name.startswith(MEMORY)}
    expected, shelves = _expected(network, optimizer, found, path), _shelves(network)
    own = {
        name: _own(shelves.get(_parts(name)[2], (None, None))[1], path, name, found[name], like)
        for name, like in expected.items()
    }
    if isinstance(optimizer, SecondOrder):
        recall_whole(optimizer, memory, comm)
    with torch.no_grad():
        for name, like in expected.items():
            kind, key, _ = _parts(name)
            if kind == "state":
                optimizer.state[like][key] = (
                    own[name] if key == "step" else own[name].to(like.device)
                )  # as PyTorch has it
            else:
                like.copy_(own[name])
    _recall_fits(network, fits, comm)
    torch.set_rng_state(states[comm.rank % len(states)].clone())  # which takes the memory, not the row, of a view
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    return text["run"], history


def describe(network: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A fingerprint of the kinds of all modules, with what they tell of themselves, and of the optimizer's kind."""
    found = [type(optimizer).__name__]
    for name, module in network.named_modules():
        words = module.extra_repr()
        if isinstance(module, ParallelModule):  # what they say of their solvers does not matter
            words = " ".join(str(getattr(module, each, "")) for each in ("Tf", "template", "kinds")).strip()
        elif isinstance(module, ParameterStack):  # of this rank's layers
            words = ""
        found.append(f"{name} {type(module).__name__} {words}")
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def _whole_fits(network: nn.Module, comm: Any) -> dict[str, Tensor]:
    """The sums of fitted long steps, of all intervals of each group of ranks that shares the layers. Collective.

    Their names have the coarsening factor, as other intervals have no use for them; before the first batch they are
    empty.
    """
    whole = {}
    for number, solver in enumerate(mgrit_solvers(network)):
        if solver.fit is None:
            continue
        own = [None if sums is None else sums.cpu() for sums in (solver.fit.squares, solver.fit.targets)]
        gathered = comm.gather((_group(solver, comm), solver.grid.begin, own)) or []
        for group, parts in groupby(sorted(gathered, key=itemgetter(0, 1)), itemgetter(0)):
            for name, rows in zip(FITTED, zip(*(sums for *_, sums in parts))):
                key = f"{FIT}{number}.{solver.factors[0]}.{group}.{name}"
                whole[key] = torch.empty(0) if rows[0] is None else torch.cat(rows)
    return whole


def _recall_fits(network: nn.Module, fits: Mapping[str, Tensor], comm: Any) -> None:
    """Give the solvers what `_whole_fits` gave; those with other intervals begin anew. Collective.

    Where there are more groups than there were, several begin with what one has learned.
    """
    for number, solver in enumerate(mgrit_solvers(network)):
        if solver.fit is None:
            continue
        grid, factor, group = solver.grid, solver.factors[0], _group(solver, comm)
        kinds = [[fits[key] for key in _fits_of(fits, number, factor, name)] for name in FITTED]
        whole = [groups[group % len(groups)] for groups in kinds if groups]
        own = slice(grid.begin // factor, -(-grid.end // factor))
        is_alike = len(whole) == 2 and all(len(sums) == -(-grid.num_steps // factor) for sums in whole)
        device = next(network.parameters()).device  # where the maps are solved for, which rounds in its own way
        solver.fit = IntervalFit(*(sums[own].to(device, copy=True) for sums in whole)) if is_alike else IntervalFit()


def _fits_of(fits: Mapping[str, Tensor], number: int, factor: int, name: str) -> list[str]:
    """The names of these sums, group by group."""
    names = (f"{FIT}{number}.{factor}.{group}.{name}" for group in range(len(fits)))
    return [each for each in names if each in fits]


def _group(solver: LayerMgrit, comm: Any) -> int:
    """The number of the group of ranks that shares the layers with this one, among those of `comm`. Collective."""
    first = solver.grid.mpi.bcast(comm.rank)
    return sorted(set(comm.allgather(first))).index(first)


def _expected(
    network: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Any], path: str
) -> dict[str, Any]:
    """What the file must have, by name, each with the tensor that it must be like."""
    expected = dict(_tensors(network, None))
    keys = [] if isinstance(optimizer, SecondOrder) else _state_keys(optimizer)
    for name, parameter in network.named_parameters():
        if any(f"state.{key}.{name}" in stored for key in keys):  # a parameter that has had no gradient has no state
            expected |= {f"state.{key}.{name}": parameter for key in keys}
    for missing in sorted(set(expected) - set(stored)):
        raise InputError(f"-restart {path}", f"no {missing}", "a checkpoint of this network and optimizer")
    for unknown in sorted(set(stored) - set(expected)):
        raise InputError(f"-restart {path}", f"{unknown}, which is not known", "what this network and optimizer have")
    return expected


def _own(shelf: Shelf | None, path: str, name: str, value: Any, like: Tensor) -> Any:
    """This rank's part of a tensor, which has the shape and the type that it must have."""
    if name.startswith("state.") and (not torch.is_tensor(value) or value.dim() == 0):  # a count of steps
        return value
    own = value[shelf.begin : shelf.end].clone() if shelf is not None else value
    rows = value.shape[0] if shelf is not None else 0
    fits = own.shape == like.shape and (shelf is None or rows == shelf.total)
    if not fits or own.dtype != like.dtype:
        got, legal = (f"{tuple(each.shape)}, {each.dtype}" for each in (value, like))
        raise InputError(f"-restart {path}", f"{name} of shape {got}", f"{legal}, as this network has")
    return own


def _state_keys(optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of an optimizer's state of one parameter, as a step of a twin makes them."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    twin: Any = type(optimizer)([parameter])
    twin.param_groups[0].update(optimizer.defaults)
    twin.step()
    return [key for key, value in twin.state[parameter].items() if value is not None]


def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Parameters, buffers and the optimizer's state of this rank, by name."""
    found: dict[str, Any] = {f"buffer.{name}": buffer for name, buffer in network.named_buffers()}
    for name, parameter in network.named_parameters():
        found[f"parameter.{name}"] = parameter.detach()
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            if value is not None:
                found[f"state.{key}.{name}"] = value
    return found


def _parts(name: str) -> tuple[str, str, str]:
    """Kind, key of the state, and name of the parameter or buffer."""
    kind, _, rest = name.partition(".")
    key, _, of = rest.partition(".") if kind == "state" else ("", "", rest)
    return kind, key, of


def _shelves(network: nn.Module) -> dict[str, tuple[Any, Shelf]]:
    """Where the rows of parameters and buffers live that are spread over ranks, by name: communicator and shelf.

    Coefficients of splines are not among them: they are equal on all ranks.
    """
    names = {id(tensor): name for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    return {
        names[id(tensor)]: (module.grid.mpi, shelf)
        for module in network.modules()
        if isinstance(module, StackedLayers)
        for shelf in module.shelves
        for tensor in shelf.tensors()
        if id(tensor) in names or not spline_coefficients(module)
    }
