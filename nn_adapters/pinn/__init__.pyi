# The loss, its terms, and the shape of the network.
from nn_adapters.pinn.loss import LocalPINN as LocalPINN, PINN as PINN
from nn_adapters.pinn.terms import (
    Ansatz as Ansatz,
    Chunk as Chunk,
    Field as Field,
    Residual as Residual,
    Term as Term,
    TermAtPoints as TermAtPoints,
)
from nn_adapters.pinn.termrows import TermRows as TermRows
from nn_adapters.pinn.trained import TrainedField as TrainedField
from nn_adapters.pinn.balance import BALANCES as BALANCES, balanced_factors as balanced_factors
from nn_adapters.pinn.costs import CallTimes as CallTimes
from nn_adapters.pinn.network import (
    NETWORK_BODIES as NETWORK_BODIES,
    DenseLayer as DenseLayer,
    JetSweep as JetSweep,
    Network as Network,
    absorb_slopes as absorb_slopes,
)

from nn_adapters.pinn.features import Features as Features, periodic as periodic, stretched as stretched

# Points in a box.
from nn_adapters.pinn.points import (
    POINT_SAMPLERS as POINT_SAMPLERS,
    Intervals as Intervals,
    Sampler as Sampler,
    adaptive_points as adaptive_points,
    hammersley as hammersley,
    into_box as into_box,
    latin_hypercube as latin_hypercube,
    uniform_points as uniform_points,
    within as within,
)

from nn_adapters.pinn.domains import MeshDomain as MeshDomain, PolygonFactor as PolygonFactor

# Values with their derivatives.
from nn_adapters.pinn.jets import (
    ActivatedLayer as ActivatedLayer,
    JetBasis as JetBasis,
    JetField as JetField,
    activate_jets as activate_jets,
)
from nn_adapters.pinn.activations import ACTIVATION_NAMES as ACTIVATION_NAMES, check_activation as check_activation

__all__: list[str]
