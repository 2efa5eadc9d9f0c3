from nn_adapters.pinn.jets import ActivatedLayer as ActivatedLayer, JetBasis as JetBasis, activate_jets as activate_jets
from nn_adapters.pinn.loss import Evaluation as Evaluation, LocalPINN as LocalPINN, PINN as PINN, Term as Term
from nn_adapters.pinn.network import (
    DenseLayer as DenseLayer,
    Network as Network,
    JetSweep as JetSweep,
    absorb_slopes as absorb_slopes,
)
from nn_adapters.pinn.points import (
    adaptive_points as adaptive_points,
    hammersley as hammersley,
    into_box as into_box,
    latin_hypercube as latin_hypercube,
    uniform_points as uniform_points,
)

__all__: list[str]
