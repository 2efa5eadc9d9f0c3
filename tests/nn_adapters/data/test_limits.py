"""Files that would expand to more than they seem, and files that are none: refused before anything is allocated."""

import bz2
import gzip
import io
import os
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import scipy.io

from nn_adapters.data import formats
from nn_adapters.data.dataset import make_dataset
from nn_adapters.data.limits import EXPANSION, LIMIT_MB, Allowance
from pdeopt.core.errors import InputError
from tests.helpers.data_files import CIFAR_NAMES, write_idx, write_npz
from tests.helpers.support import ROOT, environment

ZEROS = bytes(1 << 20)


def zipped(members, path, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, start in members.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(start)
                for _ in range(40):
                    file.write(ZEROS)


def npy(shape, kind="<f8"):
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"shape": shape, "fortran_order": False, "descr": kind})
    return content.getvalue()


def compressed_mat(dims, numbers):
    """A variable `cube` of these dimensions, stated, and this many bytes of zeros in a compressed element."""
    body = struct.pack("<4I", 6, 8, 2, 0) + struct.pack("<4I", 5, 8, *dims) + struct.pack("<2I4s4x", 1, 4, b"cube")
    packer = zlib.compressobj()
    inner = struct.pack("<2I", 14, len(body) + 8 + numbers) + body + struct.pack("<2I", 2, numbers)
    packed = packer.compress(inner) + b"".join(packer.compress(ZEROS) for _ in range(numbers >> 20)) + packer.flush()
    return (
        b"MATLAB 5.0 MAT-file".ljust(124)
        + struct.pack("<H", 0x0100)
        + b"IM"
        + struct.pack("<2I", 15, len(packed))
        + packed
    )


def write_bombs(folder):
    """Small files that state or have 40 MB and more; what reads each."""
    idx = struct.pack(">BBBBI", 0, 0, 8, 1, 40 << 20)
    with gzip.open(folder / "idx.gz", "wb") as file:
        file.write(idx)
        for _ in range(40):
            file.write(ZEROS)
    (folder / "idx").write_bytes(struct.pack(">BBBB3I", 0, 0, 14, 3, *[2**32 - 1] * 3) + b"21 bytes")
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("data_batch_1.bin")
        member.size = 40 << 20
        with open("/dev/zero", "rb") as zeros:
            archive.addfile(member, zeros)
    zipped({"a.npy": npy((5 << 20,))}, folder / "a.npz")
    zipped({"UCI HAR Dataset/train/y_train.txt": b"1\n"}, folder / "har.zip")
    (folder / "cube.mat").write_bytes(compressed_mat((1, 1), 40 << 20))
    (folder / "dims.mat").write_bytes(compressed_mat((2**31 - 1, 2**31 - 1), 1 << 20))
    with zipfile.ZipFile(folder / "bzip2.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", npy((10,)) + bytes(80))
    return BOMBS


BOMBS = {
    "idx.gz": (formats.read_idx, ()),
    "idx": (formats.read_idx, ()),
    "cifar.tar.gz": (formats.read_cifar10_archive, (CIFAR_NAMES,)),
    "a.npz": (formats.read_npz, (["a"],)),
    "bzip2.npz": (formats.read_npz, (["a"],)),
    "har.zip": (formats.read_har, ()),
    "cube.mat": (formats.read_mat, ("cube",)),
    "dims.mat": (formats.read_mat, ("cube",)),
}


def test_bombs_are_refused_before_they_are_unpacked(tmp_path):
    """In a process of its own, whose peak is known."""
    write_bombs(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.nn_adapters.data.test_limits", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, grown = done.stdout.splitlines()
    assert len(lines) == len(BOMBS) and float(grown) < 25, done.stdout
    assert sum("-data_limit" in line for line in lines) >= 6, done.stdout


def main(folder):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (read, words) in BOMBS.items():
        try:
            read(f"{folder}/{name}", *words, limit_mb=10)
        except InputError as error:
            assert "\n" not in str(error)
            print(error)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def test_an_option_raises_the_limit(tmp_path):
    array = np.zeros(20_000_000, np.uint8)
    write_idx(tmp_path / "f", array)
    with pytest.raises(InputError, match="contents of 20 MB; legal: at most 10 MB for this file; -data_limit"):
        formats.read_idx(tmp_path / "f", limit_mb=10)
    assert len(formats.read_idx(tmp_path / "f", limit_mb=21)) == len(array)


def test_a_large_file_may_expand_by_a_factor(tmp_path):
    (tmp_path / "f").write_bytes(bytes(1000))
    assert Allowance(tmp_path / "f", LIMIT_MB).bytes == 1e6 * LIMIT_MB
    assert Allowance(tmp_path / "f", 1e-3).bytes == EXPANSION * 1000


@pytest.mark.parametrize("read", [formats.read_idx, formats.read_libsvm, formats.read_cifar10, formats.read_har])
def test_what_is_no_file_is_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "x" * 5000, "nul\0"):
        with pytest.raises(InputError):
            read(tmp_path / name)


def test_a_pipe_in_a_folder_of_har_is_refused(tmp_path):
    (tmp_path / "train" / "Inertial Signals").mkdir(parents=True)
    os.mkfifo(tmp_path / "train" / "Inertial Signals" / "body_acc_x_train.txt")
    with pytest.raises(InputError, match="no file body_acc_x_train"):
        formats.read_har(tmp_path)


class Malicious:
    def __reduce__(self):
        return exec, ("import builtins; builtins.was_executed = True",)


def test_no_code_of_a_file_is_executed(tmp_path):
    import builtins
    import pickle

    bomb = np.array([Malicious()], dtype=object)
    np.savez(tmp_path / "a.npz", a=bomb)
    np.save(tmp_path / "a.npy", bomb, allow_pickle=True)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Malicious()))
    for name in ("a.npz", "a.npy", "a.pkl"):
        for read in (formats.read_idx, formats.read_libsvm, formats.read_cifar10, formats.read_har):
            with pytest.raises(InputError):
                read(tmp_path / name)
        for read, words in ((formats.read_npz, (["a"],)), (formats.read_mat, ("a",))):
            with pytest.raises(InputError):
                read(tmp_path / name, *words)
    assert not hasattr(builtins, "was_executed")


@pytest.mark.parametrize("array", [np.array([1.0, np.nan]), np.array(["a"]), np.array([1j])], ids=["nan", "text", "1j"])
def test_arrays_that_are_no_finite_numbers_are_refused(tmp_path, array):
    np.savez(tmp_path / "f.npz", a=array)
    with pytest.raises(InputError, match=r"not finite|of type"):
        formats.read_npz(tmp_path / "f.npz", ["a"])
    scipy.io.savemat(tmp_path / "f.mat", {"a": array})
    with pytest.raises(InputError, match=r"not finite|of type|is a char"):
        formats.read_mat(tmp_path / "f.mat", "a")


@pytest.mark.parametrize("shape", [(10**9, 10**9), (3, 4), (2**63,)])
def test_headers_of_arrays_are_checked_first(tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as archive:
        archive.writestr("a.npy", npy(shape) + bytes(80))
    with pytest.raises(InputError, match="its header says"):
        formats.read_npz(tmp_path / "f.npz", ["a"])


def test_the_blocks_of_a_bzip2_archive_are_what_cannot_be_bounded():
    assert len(bz2.compress(bytes(40 << 20))) < 100  # hence these archives are refused


def test_other_arrays_of_the_file_are_read_whole(tmp_path):
    write_npz(tmp_path / "f.npz")
    assert formats.read_npz(tmp_path / "f.npz", ["b"])[0].shape == (500,)


GOOD = (np.zeros((3, 2)), [0, 1, 1])


@pytest.mark.parametrize(
    "x, y, match",
    [
        (np.full((2, 2), np.nan), [0, 1], "not finite"),
        (np.full((2, 2), 1e300), [0, 1], "single precision"),
        (np.zeros((2, 2)), [0, 2], "0 to 2; legal: whole numbers 0..1"),
        (np.zeros((2, 2)), [0, -1], "whole numbers"),
        (np.zeros((2, 2)), [0, 0.5], "whole numbers"),
        (np.zeros((2, 2)), [0], "as many classes"),
        (np.zeros((0, 2)), [], "at least one sample"),
        (np.array([["a"], ["b"]]), [0, 1], "real numbers"),
        (np.zeros((2, 3)), [0, 1], "one shape"),
    ],
)
def test_samples_and_classes_are_checked(x, y, match):
    assert len(make_dataset("mine", GOOD, GOOD, 2).y_test) == 3
    with pytest.raises(InputError, match=match):
        make_dataset("mine", GOOD, (x, y), 2)


if __name__ == "__main__":
    main(sys.argv[1])
