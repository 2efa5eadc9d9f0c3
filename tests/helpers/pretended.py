"""A device that any machine has, with numbers: its tensors say that they are on "lazy", and the host computes them.

As on a real device, an operation that has tensors of both, but for single numbers of the host, is an error, and NumPy
does not take them. Copies from one to the other, and numbers that are asked for, are noted: a real device is waited for
there. ("lazy" is a kind of device of PyTorch that nothing here uses, and whose derivatives are found on the host.)
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = "lazy"

aten = torch.ops.aten
#: What may have tensors of both; what asks for a number.
TO, INTO = aten._to_copy.default, aten.copy_.default
NUMBERS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
#: Makes zeros without memory, which PyTorch's operations do not know below a mode.
EMPTY_ZEROS = aten._efficientzerotensor.default


class There(torch.Tensor):
    """A tensor on the device; `held` has its numbers, on the host."""

    @staticmethod
    def __new__(cls, held):
        words = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **words)

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"There({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), words=None):
        raise RuntimeError(f"{function}: the pretended device is off")


class PretendedDevice(TorchDispatchMode):
    """The device, while this is on.

    Attributes:
        crossings: in their order "there" and "home", for copies from the host and to it, and "number", where one was
            asked for.
        largest: entries of the largest tensor that was copied, either way.
    """

    def __init__(self):
        super().__init__()
        self.crossings, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), words=None):
        words = dict(words or {})
        tensors = [each for each in tree_leaves((args, words)) if isinstance(each, torch.Tensor)]
        there = [each for each in tensors if isinstance(each, There)]
        goes_there = isinstance(args[0], There) if function is INTO else bool(there)
        if words.get("device") is not None:
            goes_there = torch.device(words["device"]).type == DEVICE
            words["device"] = torch.device("cpu") if goes_there else words["device"]
        self._note(function, args, tensors, goes_there)
        if function is EMPTY_ZEROS and goes_there:
            function = aten.zeros.default
        held_args, held_words = tree_map_only(There, lambda each: each.held, (args, words))
        found = function(*held_args, **held_words)
        if not goes_there:
            return found
        given = {id(each.held): each for each in there}  # what is written to is returned
        return tree_map_only(torch.Tensor, lambda each: given[id(each)] if id(each) in given else There(each), found)

    def _note(self, function, args, tensors, goes_there):
        """What waits, and what cannot be."""
        if function in (TO, INTO):
            source = args[function is INTO]
            if goes_there != isinstance(source, There):
                self.crossings.append("there" if goes_there else "home")
                self.largest = max(self.largest, source.numel())
        elif any(isinstance(each, There) for each in tensors):
            if function in NUMBERS:
                self.crossings.append("number")
            if mixed := [tuple(each.shape) for each in tensors if not isinstance(each, There) and each.dim()]:
                raise RuntimeError(f"{function}: tensors of the host, {mixed}, and of the device")

    def spent(self):
        """The crossings since the last call."""
        found, self.crossings = self.crossings, []
        return found
