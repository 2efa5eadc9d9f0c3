"""A deep narrow autoencoder of small images, trained by K-FAC or a rival: where second order pays most.

python -m problems.autoencoder                                           # scikit-learn's digits
python -m problems.autoencoder -data_dir DATA -target_loss 1.4
python -m problems.autoencoder -data_dir DATA -target_loss 1.4 -optimizer adam -lr 3e-3 -max_steps 2000
"""

from __future__ import annotations

from collections.abc import Sequence

import nn_adapters as nna
from problems.shared.command_line import start
from problems.shared.curvature_training import CurvatureScript, dense_network
from problems.shared.fit_steps import Fit, FitSettings, hidden_widths

#: Neurons from the image to the code.
WIDTHS = 120, 60, 30, 10


def task(own: FitSettings, data: nna.Dataset) -> Fit:
    """|x - x^|^2 / 2 of the images; the decoder mirrors the encoder."""
    x, x_test = data.x_train.flatten(1), data.x_test.flatten(1)
    down = [x.shape[1], *hidden_widths(own.widths, WIDTHS)]
    network = dense_network([*down, *down[-2::-1]], own.activation)
    network.to(x.dtype)
    return Fit(network, nna.SquaredError(), x, x, x_test, x_test, False)


DEFAULTS = {"averaging": 16.0, "rival": "adam", "rival_lr": 0.01}
SCRIPT = CurvatureScript("autoencoder", __doc__, task, (), DEFAULTS)
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the loss of all training samples."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
