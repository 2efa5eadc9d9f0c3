# Data sets for classification.
from nn_adapters.data.dataset import Dataset as Dataset, make_dataset as make_dataset, split_by_class as split_by_class
from nn_adapters.data.datasets import (
    DATASET_NAMES as DATASET_NAMES,
    HAR_TEST_SUBJECTS as HAR_TEST_SUBJECTS,
    STORED_SETS as STORED_SETS,
    load_dataset as load_dataset,
    scaled_to_one as scaled_to_one,
)
from nn_adapters.data.generated import (
    GENERATED_SETS as GENERATED_SETS,
    digits as digits,
    indian_pines_like as indian_pines_like,
    moving_shapes as moving_shapes,
    peaks as peaks,
    peaks_grid as peaks_grid,
    synthetic_har as synthetic_har,
)

# Files: where they come from, and their formats.
from nn_adapters.data.sources import MIRRORS as MIRRORS, SHA256 as SHA256, Source as Source
from nn_adapters.data.limits import LIMIT_MB as LIMIT_MB
from nn_adapters.data.formats import (
    HAR_CHANNELS as HAR_CHANNELS,
    read_cifar10 as read_cifar10,
    read_cifar10_archive as read_cifar10_archive,
    read_har as read_har,
    read_idx as read_idx,
    read_libsvm as read_libsvm,
    read_mat as read_mat,
    read_npz as read_npz,
    checksum as checksum,
    verify_checksum as verify_checksum,
)

# Videos: single ones, sets in folders, and features of their frames.
from nn_adapters.data.videos import (
    MOVIE_ENDINGS as MOVIE_ENDINGS,
    read_image as read_image,
    read_video as read_video,
    write_video as write_video,
)
from nn_adapters.data.videosets import (
    VideoSet as VideoSet,
    find_videos as find_videos,
    load_videos as load_videos,
    read_split as read_split,
    write_video_set as write_video_set,
)
from nn_adapters.data.encoders import FrozenEncoder as FrozenEncoder, read_weights as read_weights
from nn_adapters.data.features import (
    StoredDataset as StoredDataset,
    open_features as open_features,
    store_features as store_features,
)

__all__: list[str]
