"""A CUDA graph for tensors of the host: what is called once is done again, operation by operation, in the same memory.

As in a CUDA graph no Python runs in a replay, inputs and results keep their memory, capturing changes nothing, and
random numbers are drawn anew. What PyTorch refuses in a capture is refused here, too: numbers that Python asks for,
results whose size depends on values, and tensors that are made of Python's numbers, which would come from the host.
On a GPU memory that was freed in the capture is used again; here it is not.
"""

from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations that a device would have to be waited for, or that bring memory of the host to it.
REFUSED = (
    "_local_scalar_dense",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "bincount",
    "lift_fresh",
)


@contextmanager
def inside_a_graph():
    """Inside, PyTorch says that a CUDA graph is being captured."""
    yes = {"is_initialized": lambda: True, "is_current_stream_capturing": lambda: True}
    with mock.patch.multiple("torch.cuda", **yes):
        yield


class _Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), words=None):
        words, name = words or {}, function.overloadpacket.__name__
        by_mask = name == "index" and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
        if name in REFUSED or by_mask:
            raise RuntimeError(f"{function} in a capture")
        self.graph.keep(args, words)
        result = function(*args, **words)
        self.graph.add(function, args, words, result)
        return result


class HostGraph:
    """As `nn_adapters.training.CudaGraph`.

    Attributes:
        steps: the operations of a replay.
    """

    device = "cpu"
    warm_up = staticmethod(nullcontext)
    on = staticmethod(nullcontext)

    def __init__(self):
        self.steps, self._made, self._outside = [], set(), {}

    @contextmanager
    def capture(self):
        """Inside, operations are recorded; afterwards all that was there before is as it was."""
        random = torch.get_rng_state()
        try:
            with inside_a_graph(), _Recorder(self):
                yield
        finally:
            torch.set_rng_state(random)
            for memory, value in self._outside.values():
                memory.copy_(value)
            self._outside = {}

    def keep(self, args, words):
        """Remember the values of tensors that were there before."""
        for tensor in _tensors((args, words)):
            memory = tensor.untyped_storage()
            if memory._cdata not in self._made and memory._cdata not in self._outside:
                whole = torch.empty(0, dtype=torch.uint8).set_(memory)
                self._outside[memory._cdata] = whole, whole.clone()

    def add(self, function, args, words, result):
        """One more operation, unless it is a view of memory that is there."""
        before = {tensor.untyped_storage()._cdata for tensor in _tensors((args, words))}
        results = _tensors(result)
        is_view = not function._schema.is_mutable and all(t.untyped_storage()._cdata in before for t in results)
        self._made |= {tensor.untyped_storage()._cdata for tensor in results} - before
        self.steps.append((None if is_view else function, args, words, result))  # views keep their memory alive

    @torch.no_grad()
    def replay(self):
        """Do it again: results go where they went."""
        for function, args, words, result in self.steps:
            if function is not None:
                found = function(*args, **words)
                for into, value in zip(_tensors(result), _tensors(found), strict=True):
                    if into.untyped_storage()._cdata != value.untyped_storage()._cdata:
                        into.copy_(value)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
