"""Sets that are read from files: small ones, downloads, and the real ones where they are."""

import hashlib
import sys
import tarfile
import types

import numpy as np
import pytest
import scipy.io
import torch

from nn_adapters.data import datasets, formats, sources
from nn_adapters.data.datasets import load_dataset
from pdeopt.core.errors import InputError
from tests.helpers.data_files import (
    CIFAR_NAMES,
    check_dataset,
    cifar10_batch,
    samples_of_each_class,
    write_har,
    write_idx,
)
from tests.helpers.support import ROOT

DATA = ROOT.parent / "shared" / "data"  # see its README.md
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA}")

# Sets and where they come from.


def register(monkeypatch, root):
    """Take the files under a folder for those of the known checksums."""
    for path in root.rglob("*"):
        if (place := str(path.relative_to(root))) in sources.SHA256:
            monkeypatch.setitem(sources.SHA256, place, hashlib.sha256(path.read_bytes()).hexdigest())


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match=r"got minst; legal: peaks \| digits .* mnist \| "):
        load_dataset("minst")


@pytest.mark.parametrize("place", [{"data_dir": "somewhere"}, {"fetch": True}])
def test_a_place_for_data_without_files_is_refused(place):
    with pytest.raises(InputError, match=r"for peaks, which has no files; .*mnist"):
        load_dataset("peaks", **place)


@pytest.mark.parametrize("name", datasets.STORED_SETS)
def test_no_set_stands_in_for_another(name):
    with pytest.raises(InputError, match=rf"{name}: got no place .* -data_dir FOLDER .* -fetch"):
        load_dataset(name)


@pytest.mark.parametrize("name", datasets.STORED_SETS)
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(InputError, match=rf"-data_dir: got {tmp_path} without .*/.* or -fetch"):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_of_small_files(tmp_path, monkeypatch, zipped):
    (tmp_path / "mnist").mkdir()
    for part, n in (("train", 20), ("t10k", 10)):
        images, end = np.full((n, 28, 28), 255, dtype=np.uint8), ".gz" if zipped else ""
        images[:, 3, 4] = np.arange(n)
        write_idx(tmp_path / "mnist" / f"{part}-images-idx3-ubyte{end}", images, zipped)
        write_idx(tmp_path / "mnist" / f"{part}-labels-idx1-ubyte{end}", np.arange(n, dtype=np.uint8) % 10, zipped)
    with pytest.raises(InputError, match=rf"train-images-idx3-ubyte.*: damaged .*{64 * '.'}.* legal: {64 * '.'}$"):
        load_dataset("mnist", tmp_path)
    register(monkeypatch, tmp_path)
    data = load_dataset("mnist", str(tmp_path))
    check_dataset(data, "mnist", 10, (20, 1, 28, 28), (10, 1, 28, 28))
    assert float(data.x_train.max()) == 1 and torch.equal(data.x_train[:, 0, 3, 4], torch.arange(20) / 255)


def test_cifar10_of_small_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    batches = [cifar10_batch(10, i) for i in range(6)]
    for name, (content, _, _) in zip(CIFAR_NAMES, batches):
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=r"data_batch_1\.bin: damaged"):
        load_dataset("cifar10", tmp_path)
    register(monkeypatch, tmp_path)
    check_dataset(load_dataset("cifar10", tmp_path), "cifar10", 10, (50, 3, 32, 32), (10, 3, 32, 32))
    with tarfile.open(tmp_path / "cifar10" / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    register(monkeypatch, tmp_path)
    data = load_dataset("cifar10", tmp_path)
    np.testing.assert_array_equal((255 * data.x_train[10:20]).round().numpy(), batches[1][1])
    np.testing.assert_array_equal((255 * data.x_test).round().numpy(), batches[5][1])


def test_har_is_split_by_subject_whatever_the_files_say(tmp_path):
    folder = tmp_path / "uci-har" / "UCI HAR Dataset"
    x, y, subject = write_har(folder, (("train", 24, (1, 2, 3)), ("test", 12, (3, 4, 24))))
    data = load_dataset("har", tmp_path)
    test = np.isin(subject, [2, 4, 24])
    check_dataset(data, "har", 6, ((~test).sum(), 128, 9), (test.sum(), 128, 9))
    np.testing.assert_allclose(data.x_test.numpy(), x[test], rtol=1e-6)
    assert data.y_test.tolist() == y[test].tolist()


def write_indian_pines(root, bands=5):
    """Pixels whose spectrum is their label, plus noise."""
    (root / "indian-pines").mkdir()
    rng = np.random.default_rng(0)
    labels = np.resize(np.arange(17), (12, 20)).astype(np.uint8)
    cube = (1000 + 100.0 * labels[..., None] + rng.integers(20, size=(12, 20, bands))).astype(np.uint16)
    scipy.io.savemat(root / "indian-pines" / "Indian_pines_gt.mat", {"indian_pines_gt": labels})
    scipy.io.savemat(root / "indian-pines" / "Indian_pines_corrected.mat", {"indian_pines_corrected": cube})
    return labels


def test_indian_pines_of_small_files(tmp_path, monkeypatch):
    labels = write_indian_pines(tmp_path)
    register(monkeypatch, tmp_path)
    data = load_dataset("indian_pines", tmp_path)
    total = int((labels > 0).sum())
    check_dataset(data, "indian_pines", 16, (total - len(data.y_test), 5), (len(data.y_test), 5))
    assert data.x_train.mean(0).abs().max() < 1e-6 and (data.x_train.std(0, correction=0) - 1).abs().max() < 1e-6
    order = data.x_train.mean(1).argsort()
    assert (data.y_train[order].diff() >= 0).all()  # pixels have kept their labels
    again, other = load_dataset("indian_pines", tmp_path), load_dataset("indian_pines", tmp_path, seed=1)
    assert torch.equal(again.x_test, data.x_test) and not torch.equal(other.x_test, data.x_test)


def test_a_cube_of_another_shape_is_refused(tmp_path, monkeypatch):
    write_indian_pines(tmp_path)
    path = tmp_path / "indian-pines" / "Indian_pines_corrected.mat"
    scipy.io.savemat(path, {"indian_pines_corrected": np.ones((3, 4, 5))})
    register(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=r"Indian_pines_corrected\.mat: shape: got \(3, 4, 5\); legal: \(12, 20\)"):
        load_dataset("indian_pines", tmp_path)


# Downloads: a package pooch that finds everything, or nothing.


@pytest.fixture
def pooch(monkeypatch, tmp_path):
    """`pooch.files` are on the net, by their addresses; `pooch.asked` are the addresses that were asked for."""
    module = types.ModuleType("pooch")
    module.files, module.asked = {}, []

    def retrieve(url, known_hash, fname, path):
        module.asked.append(url)
        if url not in module.files:
            raise OSError("no connection")
        if known_hash != "sha256:" + hashlib.sha256(module.files[url]).hexdigest():
            raise ValueError("hash mismatch")
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes(module.files[url])

    module.retrieve, module.os_cache = retrieve, lambda name: tmp_path / "cache" / name
    monkeypatch.setitem(sys.modules, "pooch", module)
    return module


def lines(n):
    return "".join(f"{'+1' if i % 2 else '-1'} {' '.join(f'{j}:{i * j}' for j in range(1, 15))}\n" for i in range(n))


ADDRESS = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/australian"


@pytest.mark.parametrize("given", [True, False])
def test_what_is_missing_is_downloaded_once(pooch, tmp_path, monkeypatch, given):
    pooch.files[ADDRESS] = lines(20).encode()
    monkeypatch.setitem(sources.SHA256, "libsvm/australian", hashlib.sha256(pooch.files[ADDRESS]).hexdigest())
    folder = tmp_path / "mine" if given else ""
    data = load_dataset("australian", folder, fetch=True)
    check_dataset(data, "australian", 2, (16, 14), (4, 14))
    assert (data.x_train.abs().max(), pooch.asked) == (1, [ADDRESS])
    assert ((folder or tmp_path / "cache" / "pdeopt") / "libsvm" / "australian").is_file()
    load_dataset("australian", folder, fetch=True)
    assert pooch.asked == [ADDRESS]


def test_a_download_without_a_connection_names_all_mirrors(pooch):
    with pytest.raises(InputError, match=r"zalando.*no connection; .*s3-website.*no connection; .*-data_dir with"):
        load_dataset("fashion_mnist", fetch=True)


def test_another_mirror_is_tried_where_the_checksum_is_wrong(pooch, monkeypatch):
    name = "train-images-idx3-ubyte.gz"
    first, second = (mirror + name for mirror in sources.MIRRORS["mnist/"])
    pooch.files = {first: b"damaged", second: b"\0\0\x08\1\0\0\0\1a"}
    monkeypatch.setitem(sources.SHA256, f"mnist/{name}", hashlib.sha256(pooch.files[second]).hexdigest())
    with pytest.raises(InputError, match="train-labels-idx1-ubyte"):
        load_dataset("mnist", fetch=True)
    assert pooch.asked[:2] == [first, second]


def test_a_damaged_file_is_not_downloaded_again_unasked(pooch, tmp_path):
    (tmp_path / "libsvm").mkdir()
    (tmp_path / "libsvm" / "australian").write_text("mine")
    with pytest.raises(InputError, match=r"libsvm/australian: damaged"):
        load_dataset("australian", tmp_path, fetch=True)
    assert (tmp_path / "libsvm" / "australian").read_text() == "mine" and not pooch.asked


@pytest.mark.parametrize("name", datasets.STORED_SETS)
def test_each_set_has_an_address_and_a_checksum(pooch, name):
    with pytest.raises(InputError, match="no connection"):
        load_dataset(name, fetch=True)
    assert pooch.asked and not any(" " in address for address in pooch.asked)
    assert all(len(checksum) == 64 for checksum in sources.SHA256.values())


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(InputError, match="pip install pooch"):
        load_dataset("mnist", fetch=True)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        load_dataset("digits")


# The real files.


@needs_data
@pytest.mark.parametrize(
    "name, train, test",
    [
        (
            "mnist",
            [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
            [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
        ),
        ("fashion_mnist", [6000] * 10, [1000] * 10),
    ],
)
def test_the_real_mnist(name, train, test):
    data = load_dataset(name, DATA)
    check_dataset(data, name, 10, (60000, 1, 28, 28), (10000, 1, 28, 28))
    assert (samples_of_each_class(data.y_train), samples_of_each_class(data.y_test)) == (train, test)
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)


@needs_data
def test_the_real_subset_of_cifar10():
    data = load_dataset("cifar10", DATA)
    check_dataset(data, "cifar10", 10, (4000, 3, 32, 32), (1000, 3, 32, 32))
    assert samples_of_each_class(data.y_train) == [396, 366, 420, 384, 422, 393, 414, 385, 407, 413]
    assert samples_of_each_class(data.y_test) == [103, 89, 100, 103, 90, 86, 112, 102, 106, 109]
    assert data.y_train[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert (255 * data.x_train[0, :, 0, 0]).round().tolist() == [59, 62, 63]  # the first pixel, red, green, blue


@needs_data
def test_the_real_har_leaks_no_subject():
    data = load_dataset("har", DATA)
    check_dataset(data, "har", 6, (7352, 128, 9), (2947, 128, 9))
    assert samples_of_each_class(data.y_train) == [1226, 1073, 986, 1286, 1374, 1407]
    assert samples_of_each_class(data.y_test) == [496, 471, 420, 491, 532, 537]
    names = [f"{kind}_{part}" for part in ("train", "test") for kind in ("x", "subject")]
    x_train, train, x_test, test = formats.read_npz(DATA / "uci-har" / "uci_har_inertial.npz", names)
    assert set(test) == set(datasets.HAR_TEST_SUBJECTS) and not set(train) & set(test)
    assert len(set(train)) == 21 and np.array_equal(data.x_train, x_train) and np.array_equal(data.x_test, x_test)
    rows = [set(map(bytes, x.numpy().reshape(len(x), -1))) for x in (data.x_train, data.x_test)]
    assert not rows[0] & rows[1]


@needs_data
def test_the_real_australian():
    data = load_dataset("australian", DATA)
    check_dataset(data, "australian", 2, (552, 14), (138, 14))
    x, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    assert samples_of_each_class(y) == [383, 307]
    assert torch.equal(x.amin(0), -torch.ones(14)) and torch.equal(x.amax(0), torch.ones(14))


@needs_data
def test_the_real_labels_of_indian_pines():
    labels = formats.read_mat(DATA / "indian-pines" / "Indian_pines_gt.mat", "indian_pines_gt")
    assert labels.shape == (145, 145) and (labels > 0).sum() == 10249 and set(labels.ravel()) == set(range(17))
    if not (DATA / "indian-pines" / "Indian_pines_corrected.mat").exists():
        with pytest.raises(InputError, match=r"without indian-pines/Indian_pines_corrected\.mat"):
            load_dataset("indian_pines", DATA)


@needs_data
@pytest.mark.parametrize(
    "name, place", [("mnist", "mnist/t10k-labels-idx1-ubyte.gz"), ("australian", "libsvm/australian")]
)
def test_a_damaged_copy_of_a_real_file_is_refused(tmp_path, name, place):
    for other in DATA.glob(f"{place.split('/')[0]}/*"):
        path = tmp_path / other.relative_to(DATA)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(other)
    content = (DATA / place).read_bytes()
    (tmp_path / place).unlink()
    (tmp_path / place).write_bytes(content[:-1])
    with pytest.raises(InputError) as caught:
        load_dataset(name, tmp_path)
    checksum = hashlib.sha256(content[:-1]).hexdigest()
    assert all(word in str(caught.value) for word in (place, checksum, sources.SHA256[place]))


@needs_data
def test_the_checksums_are_those_of_the_readme():
    text = (DATA / "README.md").read_text()
    places = [place for place in sources.SHA256 if (DATA / place).is_file()]
    assert len(places) >= 12 and all(sources.SHA256[place] in text for place in places)
