import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from nn_adapters.data import formats
from pdeopt.core.errors import InputError
from tests.helpers.data_files import (
    CIFAR_NAMES,
    cifar10_batch,
    write_cifar10,
    write_har,
    write_idx,
    write_libsvm,
    write_mat,
    write_npz,
)
from tests.helpers.support import ROOT


def pack(folder, archive):
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.txt")):
            file.write(path, f"UCI HAR Dataset/{path.relative_to(folder)}")


def dense(found):
    x, y = found
    return x.toarray(), y


READERS = {
    "idx": (formats.read_idx, lambda path: write_idx(path, np.arange(3000, dtype=np.uint8).reshape(30, 10, 10))),
    "plain idx": (formats.read_idx, lambda path: write_idx(path, np.arange(300, dtype=np.int32), zipped=False)),
    "cifar10": (formats.read_cifar10, write_cifar10),
    "libsvm": (lambda path: dense(formats.read_libsvm(path)), write_libsvm),
    "mat": (lambda path: formats.read_mat(path, "cube"), write_mat),
    "npz": (lambda path: formats.read_npz(path, ["a", "b"]), write_npz),
}


@pytest.fixture(params=READERS)
def case(request, tmp_path):
    """(reader, file, what it should find)"""
    read, write = READERS[request.param]
    path = tmp_path / f"mine-{request.param.replace(' ', '-')}{'.npz' if request.param == 'npz' else ''}"
    if request.param == "mat":
        path = path.with_suffix(".mat")
    return read, path, write(path)


def check(found, expected):
    if isinstance(expected, np.ndarray):
        found, expected = [found], [expected]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype.isnative and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_what_is_written_is_what_is_read(case):
    read, path, expected = case
    check(read(path), expected)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(case, share):
    read, path, _ = case
    content = path.read_bytes()
    # LIBSVM text has no length: a file cut between two numbers is one of fewer numbers.
    cut = content.rindex(b":") + 1 if path.name == "mine-libsvm" and share else int(share * len(content))
    path.write_bytes(content[:cut])
    with pytest.raises(InputError, match=path.name):
        read(path)


def test_another_file_is_refused_by_name(case):
    read, path, _ = case
    for content in (b"<html>404 Not Found</html>\n" * 50, bytes(range(256)) * 13, pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(InputError, match=path.name):
            read(path)


def test_a_missing_file_is_refused_by_name(case):
    read, path, _ = case
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name}: got no such file"):
        read(path)


@pytest.mark.parametrize("case", ["idx", "mat", "npz"], indirect=True)
def test_a_changed_byte_of_a_compressed_file_is_refused_or_has_no_effect(case):
    read, path, expected = case
    whole, refused = path.read_bytes(), 0
    places = range(0, len(whole), len(whole) // 50)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            check(read(path), expected)  # dates and the like
        except InputError as error:
            assert path.name in str(error)
            refused += 1
    assert refused > len(places) // 2


@pytest.mark.parametrize("kind", formats.IDX_TYPES.values())
@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_of_all_types(tmp_path, kind, zipped):
    array = np.arange(24).reshape(2, 3, 4).astype(np.dtype(kind).newbyteorder("="))
    write_idx(tmp_path / "f", array, zipped)
    found = formats.read_idx(tmp_path / "f")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    "header",
    [
        b"\1\0\x08\1\0\0\0\2",
        b"\0\0\x07\1\0\0\0\2",
        b"\0\0\x08\0",
        b"\0\0\x08\2\0\0\0\2",
        b"\0\0\x08\1\0\0\0\1",
        b"\0\0\x08\2\xff\xff\xff\xff\xff\xff\xff\xff",
    ],
    ids=["magic", "type", "dimensions", "within the dimensions", "too long", "huge"],
)
def test_idx_headers_are_checked(tmp_path, header):
    (tmp_path / "f").write_bytes(header + b"ab")
    with pytest.raises(InputError, match=r"IDX|at most 256 MB"):
        formats.read_idx(tmp_path / "f")


@pytest.mark.parametrize(
    "line",
    [
        "x 1:2",
        "1 1",
        "1 0:2",
        "1 2:1 1:2",
        "1 1:1 1:2",
        "1 qid:3 1:1",
        "1 1:nan",
        "nan 1:1",
        "1 5:1",
        "1 1:2é",
        "1 1_0:1",
        "1 1:1:1",
        "1 9223372036854775808:1",
        "1 1:1e999",
        "1 \x1b[2J:1",
    ],
)
def test_libsvm_lines_are_checked(tmp_path, line):
    (tmp_path / "f").write_text(f"1 1:1\n{line}\n")
    with pytest.raises(InputError, match="/f: "):
        formats.read_libsvm(tmp_path / "f", 3 if line == "1 5:1" else None)


def test_libsvm_features_may_be_more_than_are_used(tmp_path):
    write_libsvm(tmp_path / "f")
    assert formats.read_libsvm(tmp_path / "f", 7)[0].shape == (4, 7)


def test_labels_of_cifar10_are_checked(tmp_path):
    (tmp_path / "f").write_bytes(bytes([10]) * formats.CIFAR_RECORD)
    with pytest.raises(InputError, match="label 10"):
        formats.read_cifar10(tmp_path / "f")


def test_a_cifar10_archive_is_read_in_the_order_asked_for(tmp_path):
    path, batches = tmp_path / "cifar.tar.gz", {name: cifar10_batch(3, i) for i, name in enumerate(CIFAR_NAMES)}
    with tarfile.open(path, "w:gz") as archive:
        for name in reversed(CIFAR_NAMES):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(batches[name][0])
            archive.addfile(member, io.BytesIO(batches[name][0]))
    for (images, labels), name in zip(formats.read_cifar10_archive(path, CIFAR_NAMES), CIFAR_NAMES, strict=True):
        np.testing.assert_array_equal(images, batches[name][1])
        np.testing.assert_array_equal(labels, batches[name][2])
    with pytest.raises(InputError, match=r"cifar.tar.gz.*other\.bin"):
        formats.read_cifar10_archive(path, ["other.bin"])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"cifar\.tar\.gz"):
        formats.read_cifar10_archive(path, CIFAR_NAMES)


def test_variables_of_matlab_files_are_named(tmp_path):
    write_mat(tmp_path / "f.mat")
    with pytest.raises(InputError, match=r"f\.mat.*variables cube, other.*the variable gt"):
        formats.read_mat(tmp_path / "f.mat", "gt")


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "f.npz", a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(InputError, match=r"f\.npz.*allow_pickle"):
        formats.read_npz(tmp_path / "f.npz", ["a"])
    with pytest.raises(InputError, match=r"f\.npz.*KeyError"):
        formats.read_npz(tmp_path / "f.npz", ["b"])
    for file in (ROOT / "nn_adapters" / "data").glob("*.py"):
        text = file.read_text()
        assert "import pickle" not in text and "allow_pickle=True" not in text
        assert text.count("torch.load(") == text.count("weights_only=True")  # which reads tensors alone


@pytest.mark.parametrize("packed", [False, True])
def test_the_original_files_of_har(tmp_path, packed):
    folder, archive = tmp_path / "UCI HAR Dataset", tmp_path / "UCI HAR Dataset.zip"
    x, y, subject = write_har(folder)
    pack(folder, archive)
    found = formats.read_har(archive if packed else folder)
    np.testing.assert_allclose(found[0], x, rtol=1e-6)
    np.testing.assert_array_equal(found[1], y)
    np.testing.assert_array_equal(found[2], subject)


@pytest.mark.parametrize(
    "name, content",
    [
        ("test/Inertial Signals/body_gyro_y_test.txt", "1 2 3\n"),
        ("train/y_train.txt", "7\n" * 5),
        ("train/subject_train.txt", "1\n"),
        ("test/y_test.txt", ""),
        ("test/Inertial Signals/total_acc_z_test.txt", None),
        ("train/Inertial Signals/body_acc_x_train.txt", "1 2\n1 2 3\n"),
    ],
)
def test_damaged_files_of_har_are_refused_by_name(tmp_path, name, content):
    folder, archive = tmp_path / "UCI HAR Dataset", tmp_path / "UCI HAR Dataset.zip"
    write_har(folder)
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    pack(folder, archive)
    for path in (folder, archive):
        with pytest.raises(InputError, match=f"{path.name}: .*Inertial Signals"):
            formats.read_har(path)


def test_a_truncated_archive_of_har_is_refused_by_name(tmp_path):
    write_har(tmp_path / "f")
    pack(tmp_path / "f", tmp_path / "har.zip")
    (tmp_path / "har.zip").write_bytes((tmp_path / "har.zip").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"har\.zip.*BadZipFile"):
        formats.read_har(tmp_path / "har.zip")
    with pytest.raises(InputError, match="nowhere"):
        formats.read_har(tmp_path / "nowhere")


def test_libsvm_text_takes_memory_by_its_numbers_not_by_its_indices(tmp_path):
    (tmp_path / "f").write_text(f"1 {formats.LARGEST_INDEX}:2\n-1 1:1\n")
    x, y = formats.read_libsvm(tmp_path / "f")
    assert x.shape == (2, formats.LARGEST_INDEX) and x.nnz == 2 and y.tolist() == [1, -1]


@pytest.mark.parametrize("content", ["1\n-1\n", "", "# nothing\n"])
def test_libsvm_text_without_values_is_refused(tmp_path, content):
    (tmp_path / "f").write_text(content)
    with pytest.raises(InputError, match="labels without values" if content[:1] == "1" else "no data"):
        formats.read_libsvm(tmp_path / "f")
