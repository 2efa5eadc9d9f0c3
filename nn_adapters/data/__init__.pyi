from nn_adapters.data.datasets import (
    Dataset as Dataset,
    digits as digits,
    indian_pines_like as indian_pines_like,
    load_dataset as load_dataset,
    moving_shapes as moving_shapes,
    peaks as peaks,
    peaks_grid as peaks_grid,
    synthetic_har as synthetic_har,
)
from nn_adapters.data.formats import (
    read_cifar10 as read_cifar10,
    read_cifar10_archive as read_cifar10_archive,
    read_har as read_har,
    read_idx as read_idx,
    read_libsvm as read_libsvm,
    read_mat as read_mat,
    read_npz as read_npz,
    verify_checksum as verify_checksum,
)

__all__: list[str]
