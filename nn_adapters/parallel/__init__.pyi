# Ranks, and what they send.
from nn_adapters.parallel.groups import Groups as Groups
from nn_adapters.parallel.counts import (
    Count as Count,
    Traffic as Traffic,
    direct_sum as direct_sum,
    halo_traffic as halo_traffic,
    pipeline_idle as pipeline_idle,
    pipeline_traffic as pipeline_traffic,
    rabenseifner_sum as rabenseifner_sum,
    ring_sum as ring_sum,
    two_level_sum as two_level_sum,
)
from nn_adapters.parallel.twolevel import TwoLevelSums as TwoLevelSums

# Splits of the work.
from nn_adapters.parallel.gradientsums import (
    GradientSums as GradientSums,
    require_equal as require_equal,
    share_weights as share_weights,
)
from nn_adapters.parallel.pipeline import Pipeline as Pipeline
from nn_adapters.parallel.domainparallel import DomainParallel as DomainParallel
from nn_adapters.parallel.imagerows import ImageRows as ImageRows

# Workers that do not wait.
from nn_adapters.parallel.hogwild import Hogwild as Hogwild, sharing_weights as sharing_weights
from nn_adapters.parallel.weightserver import WeightServer as WeightServer

__all__: list[str]
