"""Damaged checkpoints and data files: refused by one line, or without effect."""

import random
from contextlib import suppress
from importlib import import_module

import numpy as np
import pytest

from nn_adapters.data import formats
from pdeopt.core.errors import InputError
from tests.helpers.checkpointed import RUNS, differences, has_checkpoints, mutated, result, words_of
from tests.helpers.data_files import write_cifar10, write_idx, write_libsvm, write_mat, write_npz
from tests.helpers.stress import SEED, tries

#: MB that a damaged file may take before it is refused.
MODEST = 200


class Peak:
    """The MB by which this process has grown at most since this was made; 0 where the system does not tell."""

    def __init__(self):
        with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        self.before = self._status("VmRSS")

    def __call__(self):
        return self._status("VmHWM") - self.before

    def _status(self, name):
        with suppress(OSError), open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))
        return 0.0


def write_mesh(path):
    skfem = pytest.importorskip("skfem")
    skfem.MeshTri.init_circle(2).save(path)
    return None


def read_mesh(path):
    from problems.shared.meshes import read_mesh

    return read_mesh(str(path)).p


#: Reader, writer, name, and whether a checksum guards the numbers: then nothing but the right ones may come out.
FORMATS = {
    "idx.gz": (formats.read_idx, lambda path: write_idx(path, np.arange(3000, dtype=np.int32).reshape(30, 100)), True),
    "idx": (formats.read_idx, lambda path: write_idx(path, np.arange(300.0), zipped=False), False),
    "cifar.bin": (formats.read_cifar10, write_cifar10, False),
    "text": (formats.read_libsvm, write_libsvm, False),
    "cube.mat": (lambda path: formats.read_mat(path, "cube"), write_mat, True),
    "a.npz": (lambda path: formats.read_npz(path, ["a", "b"]), write_npz, True),
    "mesh.vtk": (read_mesh, write_mesh, False),
    "mesh.msh": (read_mesh, write_mesh, False),
    "mesh.vtu": (read_mesh, write_mesh, False),
}


def arrays_of(found):
    parts = found if isinstance(found, (tuple, list)) else [found]
    return [part.toarray() if hasattr(part, "toarray") and part.shape[1] < 100 else part for part in parts]


def check_arrays(found, expected, guarded):
    """The right numbers where a checksum guards them, else at least finite ones."""
    found = arrays_of(found)
    for array in found:
        assert (
            np.isfinite(getattr(array, "data", array)).all() if hasattr(array, "indptr") else np.isfinite(array).all()
        )
    if guarded:
        assert len(found) == len(expected) and all(np.array_equal(a, b) for a, b in zip(found, expected))


def test_damaged_data_files_are_refused_or_right(tally, tmp_path):
    draw, refused, whole = random.Random(SEED), 0, {}
    for name, (read, write, _) in FORMATS.items():
        write(tmp_path / name)
        whole[name] = (tmp_path / name).read_bytes(), arrays_of(read(tmp_path / name))
    for number in range(tries(1000, 45)):
        name = list(FORMATS)[number % len(FORMATS)]
        read, _, guarded = FORMATS[name]
        content, expected = whole[name]
        how, damaged = mutated(content, draw)
        (tmp_path / name).write_bytes(damaged)
        peak = Peak()
        with tally.one(f"{name}, {how} ({number})"):
            try:
                check_arrays(read(tmp_path / name), expected, guarded)
            except InputError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1 and name in str(error) and peak() < MODEST
    assert refused > 0.3 * tally.tried
    tally.check()


def checkpoint_of(name, folder):
    """The checkpoint of a run, its options, and what it found."""
    script, words = words_of(name)
    words = [*words, "-summary", str(folder / "s.json")]
    import_module(f"problems.{script}").main([*words, "-checkpoint", str(folder / "ck")])
    return script, words, (folder / "ck").read_bytes(), result(folder / "s.json")


def test_damaged_checkpoints_are_refused_or_right(tally, tmp_path, capfd):
    draw, refused = random.Random(SEED), 0
    names = [name for name in RUNS if has_checkpoints(name)]
    count = tries(100, 6)
    for place, name in enumerate(names):
        share = count // len(names) + (place < count % len(names))
        folder = tmp_path / str(place)
        folder.mkdir()
        if not share:
            continue
        script, words, content, expected = checkpoint_of(name, folder)
        for number in range(share):
            how, damaged = mutated(content, draw)
            (folder / "ck").write_bytes(damaged)
            peak = Peak()
            with tally.one(f"{name}, {how} ({number})"):
                try:
                    import_module(f"problems.{script}").main([*words, "-restart", str(folder / "ck")])
                    found = differences(result(folder / "s.json"), expected)
                    assert not found, found[:4]
                except InputError as error:
                    refused += 1
                    assert len(str(error).splitlines()) == 1 and peak() < MODEST, peak()
    assert refused > 0.8 * tally.tried
    tally.check()
