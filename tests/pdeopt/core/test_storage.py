"""Files of tensors: what is written is read, what is damaged is refused, what a killed writer left goes."""

import json
import os
import resource
import time

import pytest
import torch
from safetensors.torch import save

from pdeopt.core import storage
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.storage import digest, read_tensors, read_text, replace_file, write_tensors

PRINT = {"problem": "one", "sizes": [2, 3]}
TENSORS = {
    "a": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "b": torch.tensor(7),
    "empty": torch.empty(0, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "history.x": torch.tensor([float("nan"), float("inf")]),
    "mask": torch.tensor([True, False]),
}


@pytest.fixture
def path(tmp_path):
    write_tensors(str(tmp_path / "c"), TENSORS, {"fingerprint": PRINT, "memory": {"radius": 1 / 3}})
    return tmp_path / "c"


def forged(tensors, text):
    """A file with right checksums of whatever it holds."""
    words = json.dumps({"format": storage.FORMAT, "fingerprint": PRINT, **text})
    table = {name: (storage.NAMES[t.dtype], list(t.shape)) for name, t in tensors.items()}
    sums = {"header": words, "sha256": storage._of_header(words, table), "sha256.data": storage._of_numbers(tensors)}
    return save(tensors, metadata=sums)


def with_header(content, change):
    """The file with another header of the same tensors."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    words = json.dumps(header).encode()
    return len(words).to_bytes(8, "little") + words + content[8 + length :]


def lie(name, key, value):
    return lambda content: with_header(content, lambda header: header[name].update({key: value}))


MUTATIONS = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "length of the header": lambda content: (2**62).to_bytes(8, "little") + content[8:],
    "deep header": lambda content: (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "no header": lambda content: (2).to_bytes(8, "little") + b"[]",
    "huge shape": lie("a", "shape", [10**12]),
    "negative shape": lie("a", "shape", [-2, -3]),
    "another shape": lie("a", "shape", [3, 2]),
    "another type": lie("a", "dtype", "I64"),
    "unknown type": lie("a", "dtype", "X9"),
    "overlap": lie("half", "data_offsets", [0, 4]),
    "words for a place": lie("b", "data_offsets", ["0", "8"]),
    "another name": lambda content: with_header(content, lambda header: header.update(z=header.pop("a"))),
    "no checksum": lambda content: with_header(content, lambda header: header["__metadata__"].pop("sha256")),
    "another text": lambda content: with_header(
        content, lambda header: header["__metadata__"].update(header='{"format": "pdeopt checkpoint 3"}')
    ),
    "a bit of a number": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "not finite": lambda content: forged({"a": torch.tensor([1.0, float("nan")])}, {}),
    "another format": lambda content: forged({"a": torch.ones(1)}, {"format": "mine"}),
    "another fingerprint": lambda content: forged({"a": torch.ones(1)}, {"fingerprint": {"problem": "two"}}),
}


def test_what_is_written_is_read(path):
    tensors, text = read_tensors(str(path), PRINT)
    assert text["memory"] == {"radius": 1 / 3} == read_text(str(path))["memory"]
    assert set(tensors) == set(TENSORS)
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name].nan_to_num(), value.nan_to_num())


@pytest.mark.parametrize("name", MUTATIONS)
def test_damaged_files_are_refused(path, name):
    path.write_bytes(MUTATIONS[name](path.read_bytes()))
    with pytest.raises(InputError, match="-restart") as found:
        read_tensors(str(path), PRINT)
    assert "\n" not in str(found.value)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    begin = time.perf_counter()
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none", "/dev/zero"):
        with pytest.raises(InputError, match="-restart"):
            read_tensors(str(path), PRINT)
    with open(tmp_path / "large", "wb") as file:  # a terabyte that takes no room
        file.truncate(10**12)
    with pytest.raises(InputError):
        read_tensors(str(tmp_path / "large"), PRINT)
    assert time.perf_counter() - begin < 1


def test_points_that_are_not_finite_leave_the_old_file(path):
    before = path.read_bytes()
    with pytest.raises(SolveFailure, match="x is not finite"):
        write_tensors(str(path), {"x": torch.tensor([float("inf")])}, {"fingerprint": PRINT})
    assert path.read_bytes() == before


def test_a_disk_that_is_full_leaves_the_old_file_alone(path):
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError):
            replace_file(str(path), bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["c"]


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("c", ".d.1.part", ".c.txt", "c.part")]
    for file in [tmp_path / ".c.1234.part", *kept]:
        file.write_bytes(b"part")
    replace_file(str(tmp_path / "c"), b"new")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_equal_data_have_equal_digests_and_other_data_others():
    x = torch.arange(6.0)
    assert digest(x) == digest(x.clone()) and len({digest(y) for y in (x, -x, x.double(), x.reshape(2, 3))}) == 4
