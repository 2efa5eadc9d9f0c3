"""All scripts one after the other in one process: `mpiexec -n R python -m tests.helpers.on_ranks FOLDER NAME...`."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module

from mpi4py import MPI

KFAC = "-data digits -samples 120 -batch 60 -max_steps 4 -precision double -kfac_fisher exact -kfac_messages float64"
#: Layers by cycles on one rank, too: by default one rank goes through them in series.
CYCLES = " -layer_mgrit_serial never"

#: Runs of every script that end by a number of iterations, so that counts are compared, too.
RUNS = {
    "burgers": "-nx 12 -nt 16",
    "kernel_ridge": "-samples 300 -hier_leaf 40 -hier_rtol 1e-10",
    "kernel_svm": "-samples 300 -method admm -hier_leaf 40 -hier_rtol 1e-10 -admm_max_it 20",
    "heat": "-nx 6 -ny 4 -nt 12 -solver newton",
    "heat3d": "-n 4 -nt 12 -solver newton",
    "klein_gordon": "-nx 8 -nt 16",
    "logistic": "-data generated -samples 200 -features 20",
    "resnet_multilevel": "-data digits -samples 60 -layers 8 -width 4 -opt_max_it 3",
    "apts_mnist": "-data digits -samples 120 -opt_max_it 3 -opt_max_work 8",
    "admm_mnist": "-samples 200 -widths 12 -split_batch 50 -epochs 2 -precision double -split_precision float64",
    "kfac_mnist": KFAC,
    "compress": "-data digits -samples 120 -batch 60 -max_steps 10 -precision double -optimizer sgd -how low_rank",
    "autoencoder": KFAC,
    "large_batch": "-data digits -samples 120 -widths 8 -batch 60 -epochs 2 -mixup 0.4 -precision double",
    "pinn_burgers": "-points 60 -width 4 -opt_max_it 6",
    "pinn_klein_gordon": "-points 60 -width 4 -opt_max_it 3 -optimizer spqn",
    "pinn_diffusion_transport": "-points 60 -width 4 -opt_max_it 6",
    "pinn_allen_cahn": "-points 60 -width 4 -opt_max_it 3 -optimizer spqn",
    "pinn_inverse_burgers": "-points 60 -width 4 -opt_max_it 6",
    "pinn_kdv": "-points 60 -width 4 -opt_max_it 3 -optimizer ssbroyden",
    "pinn_kuramoto_sivashinsky": "-points 60 -width 4 -opt_max_it 6",
    "pinn_cahn_hilliard": "-points 60 -width 4 -opt_max_it 3 -optimizer spqn",
    "pinn_schroedinger": "-points 60 -width 4 -opt_max_it 6",
    "pinn_poisson_lshape": "-points 60 -width 4 -opt_max_it 6",
    "peaks": "-layers 64 -samples 60 -epochs 1" + CYCLES,
    "mnist": "-data digits -layers 64 -channels 2 -samples 60 -epochs 1" + CYCLES,
    "fashion_mnist": "-data digits -layers 64 -channels 2 -samples 60 -epochs 1" + CYCLES,
    "indian_pines": "-data indian_pines_like -layers 64 -samples 60 -epochs 1" + CYCLES,
    "har_gru": "-data synthetic_har -hidden 4 -samples 60 -epochs 1" + CYCLES,
    "video_gru": "-videos 24 -length 64 -size 8 -epochs 1" + CYCLES,
    "transformer": "-layers 16 -width 8 -hidden 8 -windows 20 -tokens 4 -dropout 0.1 -epochs 1 -bias_limit 0" + CYCLES,
    "function_regression": "-steps 20",
    "box_init": "-seeds 1 -depth 2",
}


def main(folder: str, names: list[str]) -> None:
    """Run them; a summary each."""
    for name in names:
        import_module(f"problems.{name}").main([*RUNS[name].split(), "-summary", f"{folder}/{name}.json"])


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(1)
