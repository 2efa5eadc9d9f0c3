"""All scripts, and options that make a run of each small."""

from importlib import import_module

import numpy as np

from nn_adapters.data import make_dataset

IMAGES = ["-epochs", "0", "-layers", "4", "-channels", "2"]
CONTROL = ["-nx", "4", "-nt", "8", "-sqp_max_it", "1"]
PINN = ["-points", "30", "-width", "3", "-opt_max_it", "1"]
CLASSIFIER = ["-opt_max_it", "1", "-opt_max_work", "1", "-samples", "40"]

#: The scripts, and options that make them small.
SMALL = {
    "burgers": CONTROL,
    "kernel_ridge": ["-samples", "60"],
    "kernel_svm": ["-samples", "60"],
    "heat": [*CONTROL, "-ny", "3"],
    "heat3d": ["-n", "3", "-nt", "8", "-sqp_max_it", "1"],
    "klein_gordon": CONTROL,
    "poisson": ["-n", "4", "-sqp_max_it", "1"],
    "logistic": ["-samples", "60", "-features", "5", "-opt_max_it", "1"],
    "resnet_multilevel": ["-samples", "40", "-layers", "4", "-width", "4", "-opt_max_it", "1", "-rmtr_nested", "1"],
    "apts_mnist": CLASSIFIER,
    "apts_cifar": CLASSIFIER,
    "admm_mnist": ["-epochs", "1", "-samples", "40", "-widths", "6"],
    "kfac_mnist": ["-samples", "40", "-max_steps", "2", "-widths", "6"],
    "compress": ["-samples", "60", "-max_steps", "2", "-widths", "6", "-sizes", "0.1"],
    "large_batch": ["-samples", "40", "-max_steps", "2", "-widths", "6"],
    "autoencoder": ["-samples", "40", "-max_steps", "2", "-widths", "6"],
    "pinn_burgers": PINN,
    "pinn_klein_gordon": PINN,
    "pinn_diffusion_transport": PINN,
    "pinn_allen_cahn": PINN,
    "pinn_inverse_burgers": [*PINN, "-measured", "20"],
    "pinn_kdv": PINN,
    "pinn_kuramoto_sivashinsky": PINN,
    "pinn_cahn_hilliard": PINN,
    "pinn_schroedinger": PINN,
    "pinn_poisson_lshape": PINN,
    "peaks": ["-epochs", "0", "-layers", "4"],
    "mnist": IMAGES,
    "fashion_mnist": IMAGES,
    "indian_pines": ["-epochs", "0", "-layers", "4"],
    "har_gru": ["-epochs", "0", "-hidden", "4"],
    "video_gru": ["-epochs", "0", "-videos", "24", "-length", "4", "-size", "8"],
    "transformer": ["-epochs", "0", "-layers", "4", "-width", "8", "-windows", "20", "-tokens", "4"],
    "function_regression": ["-steps", "1"],
    "box_init": ["-seeds", "1", "-depth", "2"],
}

#: Short programs of a user's kind, without options of their own.
PROGRAMS = {"reaction_diffusion_forms"}
#: Those that need DOLFINx; tests/problems/test_form_problems.py runs them.
FORMS = {"inverse_diffusion", "navier_stokes"}


def options_of(script):
    return import_module(f"problems.{script}").OPTIONS


def fake_dataset(name, data_dir="", fetch=False, seed=0, limit_mb=0.0):
    """Noise of the shape of a data set."""
    shape, classes = {
        "cifar10": ((3, 32, 32), 10),
        "peaks": ((2,), 5),
        "synthetic_har": ((128, 9), 6),
        "indian_pines_like": ((20,), 16),
        "digits": ((1, 8, 8), 10),
    }.get(name, ((1, 28, 28), 10))
    x, y = np.random.default_rng(0).standard_normal((60, *shape)), np.arange(60) % classes
    return make_dataset(name, (x[:40], y[:40]), (x[40:], y[40:]), classes)
