from nn_adapters.pinn.jets import ActivatedLayer as ActivatedLayer, JetBasis as JetBasis, activated as activated
from nn_adapters.pinn.loss import Evaluation as Evaluation, LocalPINN as LocalPINN, PINN as PINN, Term as Term
from nn_adapters.pinn.network import Layer as Layer, Network as Network, Sweep as Sweep, sloped as sloped
from nn_adapters.pinn.points import (
    adaptive as adaptive,
    hammersley as hammersley,
    into as into,
    latin_hypercube as latin_hypercube,
    uniform as uniform,
)

__all__: list[str]
