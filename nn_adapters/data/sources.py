"""Where the files of data sets come from: a folder, or a download; their checksums are verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from nn_adapters.data.formats import verify_checksum
from nn_adapters.data.limits import LIMIT_MB
from pdeopt.core.errors import InputError

#: Checksums of the files, by their place in `data_dir`.
SHA256 = {
    "mnist/train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "mnist/train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "mnist/t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "mnist/t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    "mnist/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "mnist/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "mnist/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "fashion-mnist/train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "fashion-mnist/train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "fashion-mnist/t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "fashion-mnist/t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    "fashion-mnist/train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion-mnist/train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "fashion-mnist/t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion-mnist/t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "cifar10/cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar10/cifar-10-batches-bin/data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "cifar10/cifar-10-batches-bin/data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "cifar10/cifar-10-batches-bin/data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "cifar10/cifar-10-batches-bin/data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "cifar10/cifar-10-batches-bin/data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "cifar10/cifar-10-batches-bin/test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    "cifar10/cifar10_subset_4000_1000.npz": "5e81f99fe5af185b32d0cb5efbf72c956a858f8e684fdfba6995f9e197878f5c",
    "uci-har/UCI HAR Dataset.zip": "2045e435c955214b38145fb5fa00776c72814f01b203fec405152dac7d5bfeb0",
    "uci-har/uci_har_inertial.npz": "d1a1a6b11172aaf30a6b21d2f879d46c142b3ffcc5c0b3e6289abf333f0bfe68",
    "indian-pines/Indian_pines_corrected.mat": "ec2f8808710919d566f70f0d4aa885aae1ddfd42b734aba71c5e12ca65450939",
    "indian-pines/Indian_pines_gt.mat": "65c4687a8ab04f6da4789799bc3bc4f6e88bccac3ed6a2e6ae367e5e6b9e429c",
    "libsvm/australian": "25a5d45d53b5db7c402f1bf58aea5ed5f0387ad525ec7f0131585f1f63033b38",
}

#: Where files can be downloaded, by the beginning of their place: folders that are tried in this order.
MIRRORS = {
    "mnist/": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion-mnist/": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    "cifar10/": ("https://www.cs.toronto.edu/~kriz/",),
    "uci-har/": ("https://archive.ics.uci.edu/ml/machine-learning-databases/00240/",),
    "indian-pines/Indian_pines_corrected": ("https://www.ehu.eus/ccwintco/uploads/6/67/",),
    "indian-pines/Indian_pines_gt": ("https://www.ehu.eus/ccwintco/uploads/c/c4/",),
    "libsvm/": ("https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/",),
}


class Source:
    """Finds the files of a set, and downloads them where it may.

    Args:
        name: of the set, for messages.
        data_dir: folder of the files, in the layout of `SHA256`; empty for none.
        fetch: download what is missing there, or, without a folder, in the user's cache.
        limit_mb: megabytes that a file may expand to, for its reader.

    Raises:
        InputError: neither a folder nor a download.
    """

    def __init__(self, name: str, data_dir: str | Path | None, fetch: bool, limit_mb: float = LIMIT_MB) -> None:
        self.root, self.fetch, self.limit_mb = Path(data_dir) if data_dir else None, fetch, limit_mb
        if not data_dir and not fetch:
            legal = "-data_dir FOLDER that has its files, or -fetch to download them"
            raise InputError(f"data set {name}", "no place to read it from", legal)

    def path(self, *places: str) -> Path:
        """The first of these places that is there, its checksum verified; otherwise the first of all, downloaded.

        Raises:
            InputError: none is there, a checksum that is wrong, no connection, or no package pooch.
        """
        root = Path(_pooch().os_cache("pdeopt")) if self.root is None else self.root
        for place in places:
            if _exists(path := root / place):
                if place in SHA256:
                    verify_checksum(path, SHA256[place])
                return path
        if not self.fetch:
            raise InputError("-data_dir", f"{root} without {places[0]}", " or ".join(places) + ", or -fetch")
        return _download(root / places[0], places[0])


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long for the system
        return False


def _pooch() -> Any:
    try:
        import pooch
    except ImportError:
        raise InputError("-fetch", "no package pooch", "pip install pooch, or -data_dir FOLDER") from None
    return pooch


def _download(path: Path, place: str) -> Path:
    """Download a file from the first mirror that has it. pooch renames it into place once its checksum is right."""
    pooch, failures = _pooch(), []
    for folder in next(mirrors for start, mirrors in MIRRORS.items() if place.startswith(start)):
        try:
            pooch.retrieve(folder + quote(path.name), f"sha256:{SHA256[place]}", path.name, path.parent)
            return path
        except (OSError, ValueError) as error:  # the network's errors are OSErrors, a wrong checksum is a ValueError
            failures.append(f"{folder}: {error}")
    raise InputError(f"-fetch: {path.name}", "; ".join(failures), f"a connection, or -data_dir with {place}")
