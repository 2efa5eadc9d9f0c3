# Ranks, and what they send.
from nn_adapters.parallel.groups import Groups as Groups
from nn_adapters.parallel.counts import (
    Count as Count,
    Traffic as Traffic,
    direct_sum as direct_sum,
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

__all__: list[str]
