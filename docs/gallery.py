"""One picture and one command for each problem script: `python docs/gallery.py [NAME ...]` makes the gallery.

Runs the commands, puts the pictures into docs/images/gallery/ and the section into docs/index.md. Scripts that read
data take them from the folder in the environment variable DATA. Each command takes less than two minutes on one core.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parent
PICTURES = DOCS / "images" / "gallery"
BEGIN, END = "<!-- gallery: made by docs/gallery.py -->", "<!-- end of the gallery -->"
#: Width of a picture in pixels, and its colors: less than 60 kB each.
PIXELS, COLORS = 900, 256


@dataclass(frozen=True)
class Entry:
    """A problem script, what its picture shows, and the options that make it."""

    name: str
    title: str
    page: str
    shows: str
    options: str

    @property
    def command(self) -> str:
        return f"python -m problems.{self.name} {self.options} -plot {self.name}.png".replace("  ", " ")

    @property
    def picture(self) -> Path:
        return PICTURES / f"{self.name}.png"

    def run(self) -> None:
        """Run the command, and keep its picture, small."""
        words = self.command.replace("DATA", os.environ.get("DATA", "DATA")).split()
        begin = time.perf_counter()
        subprocess.run([sys.executable, *words[1:-1], self.picture], check=True, cwd=DOCS.parent)
        shrink(self.picture)
        kilobytes = self.picture.stat().st_size / 1000
        print(f"{self.name}: {time.perf_counter() - begin:.0f} s, {kilobytes:.0f} kB", flush=True)

    def section(self) -> str:
        return (
            f"### {self.title}\n\n{self.shows} ([more]({self.page}))\n\n"
            f"```console\n$ {self.command}\n```\n\n![{self.title}](images/gallery/{self.name}.png)\n"
        )


def shrink(picture: Path) -> None:
    """Fewer pixels and colors."""
    image = Image.open(picture).convert("RGB")
    image = image.resize((PIXELS, round(image.height * PIXELS / image.width)), Image.Resampling.LANCZOS)
    image.quantize(COLORS, dither=Image.Dither.NONE).save(picture, optimize=True)


ENTRIES = [
    Entry(
        "burgers", "Burgers", "burgers.md", "A viscous flow keeps its initial step.", "-nx 64 -nt 128 -solver newton"
    ),
    Entry(
        "heat",
        "Heat",
        "heat.md",
        "A bump of heat travels through a rectangle; all time steps are solved at once.",
        "-nx 30 -ny 10 -nt 64 -alpha 1e-4 -solver newton -sqp_kkt_precond wathen",
    ),
    Entry(
        "poisson",
        "Poisson",
        "poisson.md",
        "No time, and a control that is zero where it is of little use: active sets find where.",
        "-n 64 -target waves -alpha 1e-5 -beta 1e-3 -lower -30 -upper 30",
    ),
    Entry(
        "heat3d",
        "Heat in a cube",
        "space_time.md",
        "A bump of heat travels along the diagonal of a cube, whose time steps ranks may share.",
        "-n 16 -nt 16 -alpha 1e-4 -solver newton",
    ),
    Entry(
        "navier_stokes",
        "A flow around a cylinder",
        "forms.md",
        "The skin of the cylinder moves, and drag falls: a weak form by DOLFINx, a pressure without a time derivative.",
        "-geometry cylinder -reynolds 20 -n 12 -nt 8",
    ),
    Entry(
        "inverse_diffusion",
        "Inverse diffusion",
        "forms.md",
        "How well a plate conducts, and how warm it was, from 49 sensors with noise.",
        "-n 32 -rank 10",
    ),
    Entry(
        "klein_gordon",
        "Klein–Gordon",
        "klein_gordon.md",
        "A control adds a growing wave to one that swings by itself.",
        "-nx 32 -nt 64 -solver newton",
    ),
    Entry(
        "peaks",
        "Peaks",
        "networks.md",
        "256 layers, solved in parallel, learn on which of five levels a point of the plane is.",
        "-layers 256 -epochs 20",
    ),
    Entry(
        "mnist", "Digits", "networks.md", "A convolutional network of 8 layers reads digits.", "-data digits -epochs 30"
    ),
    Entry(
        "fashion_mnist",
        "Pieces of clothing",
        "networks.md",
        "The same network on other images.",
        "-data_dir DATA -layers 8 -samples 3000 -epochs 3",
    ),
    Entry(
        "har_gru",
        "Motion of a telephone",
        "networks.md#sequences",
        "A GRU over 128 steps, solved in parallel, tells what a person does; generated signals.",
        "",
    ),
    Entry(
        "video_gru",
        "Videos",
        "networks.md#sequences",
        "An encoder of single frames and a GRU over their sequence tell how a shape moves.",
        "",
    ),
    Entry(
        "transformer",
        "A transformer",
        "networks.md#transformers-dropout-masks",
        "A pre-LN transformer of 8 blocks, solved in parallel, reads digits row by row.",
        "-data digits -layers 8 -epochs 6",
    ),
    Entry(
        "indian_pines",
        "Spectra",
        "networks.md",
        "What grows on a pixel, from the light that it reflects; generated spectra.",
        "-epochs 4",
    ),
    Entry(
        "function_regression",
        "Function regression",
        "networks_init.md",
        "A deep ReLU network with Box initialization and least squares for its last layer.",
        "-depth 16 -steps 200",
    ),
    Entry(
        "box_init",
        "Box initialization",
        "networks_init.md#box",
        "The unit square after 128 random ReLU layers.",
        "-depth 128 -seeds 5",
    ),
    Entry(
        "pinn_burgers",
        "Burgers by a network",
        "pinns.md",
        "A physics-informed network, trained by Levenberg-Marquardt steps on points that are drawn anew.",
        "-max_cpu_seconds 30",
    ),
    Entry(
        "pinn_klein_gordon",
        "Klein–Gordon by a network",
        "pinns.md",
        "The same method on a network of stretched sines.",
        "-max_cpu_seconds 10",
    ),
    Entry(
        "pinn_diffusion_transport",
        "Diffusion and transport by a network",
        "pinns.md",
        "Boundary layers of width 0.01 are in the factor of the network.",
        "-max_cpu_seconds 15",
    ),
    Entry(
        "pinn_allen_cahn",
        "Allen–Cahn by a network",
        "pinns.md",
        "Two phases separate; the network takes in the square of x, as the solution is even.",
        "-max_cpu_seconds 30",
    ),
    Entry(
        "pinn_cahn_hilliard",
        "Cahn–Hilliard by a network",
        "pinns.md",
        "Four derivatives in space; Levenberg-Marquardt steps.",
        "-max_cpu_seconds 30",
    ),
    Entry(
        "pinn_kuramoto_sivashinsky",
        "Kuramoto–Sivashinsky by a network",
        "pinns.md",
        "Waves on their way to chaos, by a network of stretched sines.",
        "",
    ),
    Entry(
        "logistic",
        "Logistic regression",
        "optimizers.md#samples",
        "A trust region whose Hessian grows from one per cent of the samples.",
        "-data australian -data_dir DATA -optimizer astrom",
    ),
    Entry(
        "kernel_ridge",
        "Kernel ridge regression",
        "kernels.md",
        "A matrix of 16,384 points in blocks of low rank, factored at once.",
        "-samples 16384",
    ),
    Entry(
        "kernel_svm",
        "Support vectors",
        "kernels.md",
        "A decision function, its margin, and the few points that hold it.",
        "-samples 4096 -noise 0.3",
    ),
    Entry(
        "resnet_multilevel",
        "Residual network on three levels",
        "optimizers.md#levels",
        "A recursive trust region with networks of half and a quarter of the layers.",
        "-data_dir DATA -optimizer rmtr -opt_max_work 10",
    ),
    Entry(
        "apts_mnist",
        "APTS on digits",
        "optimizers.md#trust-regions",
        "Four parts of the data go trust-region steps of their own.",
        "-data digits -apts_data 4",
    ),
    Entry(
        "admm_mnist",
        "Training without gradients",
        "splitting.md",
        "ADMM on split layers: every weight comes from a least-squares problem.",
        "-data digits",
    ),
    Entry(
        "kfac_mnist",
        "K-FAC on digits",
        "kfac.md",
        "A dense network by Kronecker-factored curvature, without a learning rate.",
        "-data_dir DATA -batch 1024 -target_loss 0.05",
    ),
    Entry(
        "large_batch",
        "Large batches",
        "large_batch.md",
        "All digits in each step, at layer-wise rates; sharpness on the way, and the Fisher spectrum at the end.",
        "-data digits -epochs 30 -sharpness true -spectrum true",
    ),
    Entry(
        "compress",
        "Compression",
        "compression.md",
        "A trained network in fewer bytes, and what an attack makes of it before and after.",
        "-data_dir DATA -max_steps 1000",
    ),
    Entry(
        "autoencoder",
        "Autoencoder",
        "kfac.md",
        "Images of 196 pixels through a code of ten numbers.",
        "-data_dir DATA -target_loss 1.4",
    ),
    Entry(
        "apts_cifar",
        "APTS on CIFAR-10",
        "optimizers.md#trust-regions",
        "Four parts of a batch go trust-region steps of their own.",
        "-data_dir DATA",
    ),
]


def write_section() -> None:
    """Put the section into the front page."""
    page = DOCS / "index.md"
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    sections = "\n".join(entry.section() for entry in ENTRIES if entry.picture.exists())
    page.write_text(f"{before}{BEGIN}\n\n{sections}\n{END}{after}")


if __name__ == "__main__":
    PICTURES.mkdir(parents=True, exist_ok=True)
    for entry in ENTRIES:
        if entry.name in sys.argv[1:] or len(sys.argv) == 1:
            entry.run()
    write_section()
