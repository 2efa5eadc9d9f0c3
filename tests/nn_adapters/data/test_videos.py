"""Videos from files, sets of them, pretrained encoders, and features that are computed once."""

import pickle
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from nn_adapters.data import (
    FrozenEncoder,
    find_videos,
    load_videos,
    moving_shapes,
    open_features,
    read_image,
    read_split,
    read_video,
    store_features,
    write_video_set,
)
from nn_adapters.data.videos import write_video
from pdeopt.core.errors import InputError
from problems import video_gru

pytest.importorskip("av", reason="PyAV reads movies: pip install 'pdeopt[video]'")
Image = pytest.importorskip("PIL.Image", reason="Pillow reads frames: pip install 'pdeopt[video]'")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A generated set, and its videos as .mp4 files with split files."""
    data = moving_shapes(12, 8, 16, seed=1)
    folder = tmp_path_factory.mktemp("videos") / "shapes"
    return data, folder, write_video_set(data, folder)


@pytest.fixture
def movie(shapes, tmp_path):
    """A copy of one movie, to be damaged."""
    path = tmp_path / "movie.mp4"
    path.write_bytes(next(shapes[1].glob("class0/train*.mp4")).read_bytes())
    return path


def test_a_set_written_as_movies_comes_back(shapes):
    data, folder, splits = shapes
    found = load_videos(find_videos(folder, splits), length=10, size=16)
    assert found.x_train.shape == (12, 10, 4, 16, 16) and found.classes == 6
    for x, y, x_read, y_read in (
        (data.x_train, data.y_train, found.x_train, found.y_train),
        (data.x_test, data.y_test, found.x_test, found.y_test),
    ):
        order = torch.argsort(y, stable=True)
        assert y[order].tolist() == y_read.tolist()
        assert float((x_read[:, :8, :3] - x[order]).abs().mean()) < 0.01  # MPEG-4 is lossy
    assert bool((found.x_train[:, :8, 3] == 1).all()) and not bool(found.x_train[:, 8:].any())


@pytest.mark.parametrize("ending", [".avi", ".mkv"])
def test_other_containers(tmp_path, ending):
    data = moving_shapes(5, 4, 16)
    splits = write_video_set(data, tmp_path / "set", ending)
    videos = find_videos(tmp_path / "set", splits)
    assert len(videos) == 6 and read_video(videos.paths[0], 9, 8).shape == (4, 3, 8, 8)


def test_frames_that_are_used(movie):
    whole = read_video(movie, 8, 16)
    assert torch.equal(read_video(movie, 3, 16), whole[:3])
    assert torch.equal(read_video(movie, 3, 16, "spaced"), whole[[0, 2, 5]])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"no video" * 100,
        lambda content: content[:300] + bytes(80) + content[380:],
        lambda content: b"#EXTM3U\n#EXTINF:1\n/etc/hostname\n",
    ],
)
def test_damaged_movies_are_named(movie, damage):
    movie.write_bytes(damage(movie.read_bytes()))
    with pytest.raises(InputError, match=r"movie\.mp4: got truncated, damaged or of another format"):
        read_video(movie, 8, 16)


@pytest.mark.parametrize("ending", [".mkv", ".avi"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_movies_that_end_too_early_are_named_in_any_container(tmp_path, ending, share):
    movie = tmp_path / f"movie{ending}"
    write_video(movie, torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8))
    assert len(read_video(movie, 20, 8)) == 12
    movie.write_bytes(movie.read_bytes()[: int(share * movie.stat().st_size)])
    with pytest.raises(InputError, match=r"movie\..*truncated, damaged or of another format"):
        read_video(movie, 20, 8)


def test_what_lies_beside_videos_is_passed_over_or_named(tmp_path):
    data = moving_shapes(30, 4, 16)
    write_video_set(data, tmp_path)
    videos = find_videos(tmp_path)
    first = videos.paths[0].parent
    (first / "._v.mp4").write_bytes(b"hidden"), (tmp_path / ".cache").mkdir(), (first / "notes.txt").write_text("none")
    assert find_videos(tmp_path) == videos
    (first / "more.mpg").write_bytes(b"a movie")
    with pytest.raises(InputError, match=r"more\.mpg: got a movie \.mpg"):
        find_videos(tmp_path)
    (first / "more.mpg").unlink(), (tmp_path / "zebra").mkdir()
    with pytest.raises(InputError, match="zebra: got a class without videos"):
        find_videos(tmp_path)
    with pytest.raises(InputError, match="two classes"):
        find_videos("")
    with pytest.raises(InputError, match="at least one frame"):
        write_video(tmp_path / "none.mp4", torch.zeros(0, 3, 16, 16, dtype=torch.uint8))


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for number in range(12):
        Image.fromarray(np.full((8, 8), 20 * number, dtype=np.uint8)).save(tmp_path / f"frame{number}.png")
    assert read_video(tmp_path, 12, 8)[:, 0, 0, 0].tolist() == list(range(0, 240, 20))


def test_videos_that_are_too_large_are_refused(movie):
    with pytest.raises(InputError, match=r"movie\.mp4: got contents of .*-data_limit"):
        read_video(movie, 8, 2000, limit_mb=1)


def test_folders_of_frames(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("left", "right"):
        for number in range(5):
            folder = tmp_path / kind / f"video{number}"
            folder.mkdir(parents=True)
            for frame in range(4):
                Image.fromarray(rng.integers(256, size=(10, 12, 3), dtype=np.uint8)).save(folder / f"{frame}.png")
    bad = tmp_path / "left" / "video3" / "0.png"
    gray = rng.integers(256, size=(8, 8), dtype=np.uint8)
    Image.fromarray(gray).save(bad)
    assert (read_image(bad, 8)[..., 0] == gray).all()
    Image.fromarray(gray.astype(np.uint16) * 256).save(bad)
    assert (read_image(bad, 8)[..., 0] == gray).all()
    data = load_videos(find_videos(tmp_path), length=3, size=8)
    assert data.x_train.shape == (8, 3, 4, 8, 8) and data.y_test.tolist() == [0, 1]
    Image.fromarray(np.zeros((600, 600), dtype=np.uint8)).save(bad)
    with pytest.raises(InputError, match=r"contents of 6 MB.*-data_limit"):
        load_videos(find_videos(tmp_path), 3, 8, limit_mb=1)
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"video3/0\.png: got truncated, damaged"):
        load_videos(find_videos(tmp_path), 3, 8)
    with pytest.raises(InputError, match="two classes"):
        find_videos("nowhere")


def test_split_files(shapes, tmp_path):
    _, folder, splits = shapes
    assert find_videos(folder, splits).is_test.count(True) == 2
    with pytest.raises(InputError, match=r"class0_test_split2\.txt: got no such file"):
        find_videos(folder, splits, 2)
    name = tmp_path / "class0_test_split1.txt"
    name.write_text("one.avi 1 \ntwo words.avi 2\nthree.avi 0\n")
    assert read_split(name) == {"one": False, "two words": True, "three": None}
    with pytest.raises(InputError, match="got no video one; legal: all videos of the split; 3 of 3"):
        find_videos(folder, tmp_path)
    name.write_text("one.avi 1\ntwo.avi 3\n")
    with pytest.raises(InputError, match=r"line 2: got two\.avi 3"):
        read_split(name)


# -- pretrained encoders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of a small architecture, in a file whose name tells its checksum."""
    if find_spec("torchvision") is None:
        pytest.skip("no architectures: pip install 'pdeopt[video]'")
    from nn_adapters.data.encoders import architectures
    from nn_adapters.data.formats import checksum

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(architectures().squeezenet1_1().state_dict(), path)
    return path.rename(path.with_name(f"squeezenet-{checksum(path)[:8]}.pth"))


def test_features_are_computed_once(shapes, weights, tmp_path, capsys):
    _, folder, splits = shapes
    words = f"-frames {folder} -splits {splits} -encoder squeezenet1_1 -weights {weights} -size 32 -length 10 -epochs 1"
    words = [*words.split(), "-cache", str(tmp_path)]
    first = video_gru.main(words)
    assert "112 frames encoded" in capsys.readouterr().out  # 14 videos of 8 frames
    assert video_gru.main(words) == first
    assert "frames encoded" not in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    data, encoder = open_features(str(file), verify=True), FrozenEncoder("squeezenet1_1", weights)
    assert torch.equal(pickle.loads(pickle.dumps(data)).x_train, data.x_train)
    own = read_video(next(iter(sorted(folder.glob("class0/train*.mp4")))), 10, 32)
    torch.testing.assert_close(data.x_train[0, :8, :-1], encoder(own))
    assert data.x_train[0, :, -1].tolist() == [1] * 8 + [0] * 2
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"{file.name}: got truncated, damaged .*checksum"):
        video_gru.main(words)


def test_a_file_of_features_is_that_of_its_videos(shapes, weights, tmp_path):
    _, folder, splits = shapes
    encoder = FrozenEncoder("squeezenet1_1", weights)
    videos = find_videos(folder, splits)
    files = [store_features(videos, encoder, n, 32, folder=tmp_path).file for n in (2, 3, 2)]
    assert files[0] == files[2] != files[1] and encoder.evaluated == 14 * 5
    videos.paths[0].touch()
    assert store_features(videos, encoder, 2, 32, folder=tmp_path).file not in files


def test_weights_are_checked(weights, tmp_path):
    with pytest.raises(InputError, match="damaged or another file; sha256"):
        FrozenEncoder("squeezenet1_1", weights, sha256="0" * 64)
    with pytest.raises(InputError, match=r"weights of resnet18: got \w+.* of shape"):
        FrozenEncoder("resnet18", weights)
    with pytest.raises(InputError, match=r"encoder: got resnet17; legal: .*resnet18"):
        FrozenEncoder("resnet17", weights)
    other = tmp_path / "weights-00000000.pth"
    other.write_bytes(weights.read_bytes())
    with pytest.raises(InputError, match=r"weights-00000000\.pth: damaged or another file"):
        FrozenEncoder("squeezenet1_1", other)
    other = tmp_path / "weights.pth"
    other.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"weights\.pth: got truncated, damaged"):
        FrozenEncoder("squeezenet1_1", other)
    torch.save(dict.fromkeys(["a"], 1.0), other)
    with pytest.raises(InputError, match=r"weights\.pth: got truncated, damaged or of another format \(TypeError"):
        FrozenEncoder("squeezenet1_1", other)
