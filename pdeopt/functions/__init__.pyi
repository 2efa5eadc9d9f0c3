from pdeopt.functions.border import number as number, pair as pair, vector as vector
from pdeopt.functions.checked import CheckedFunction as CheckedFunction
from pdeopt.functions.curved import (
    Curvature as Curvature,
    CurvatureFactors as CurvatureFactors,
    CurvedFunction as CurvedFunction,
    CurvedPoint as CurvedPoint,
    CurvedTerm as CurvedTerm,
    NoFactors as NoFactors,
    Tangent as Tangent,
)
from pdeopt.functions.decomposition import Decomposition as Decomposition, number_of_parts as number_of_parts
from pdeopt.functions.hierarchy import (
    Hierarchy as Hierarchy,
    Transfer as Transfer,
    as_hierarchy as as_hierarchy,
    sample_hierarchy as sample_hierarchy,
    window_transfer as window_transfer,
)
from pdeopt.functions.metrics import DiagonalMetric as DiagonalMetric, FixedMetric as FixedMetric
from pdeopt.functions.minibatch import Batches as Batches, Evaluation as Evaluation
from pdeopt.functions.sharing import alone as alone, settle as settle, share as share
from pdeopt.functions.petsc import PetscFunction as PetscFunction
from pdeopt.functions.smooth import (
    Costs as Costs,
    FirstOrderConsistent as FirstOrderConsistent,
    Metric as Metric,
    Restriction as Restriction,
    SampledFunction as SampledFunction,
    ScaledFunction as ScaledFunction,
    SmoothFunction as SmoothFunction,
    Tally as Tally,
)
from pdeopt.functions.subsampling import (
    NestedSample as NestedSample,
    WeightedSamples as WeightedSamples,
    generator as generator,
    inclusion as inclusion,
    uniform_numbers as uniform_numbers,
)
from pdeopt.functions.units import InUnits as InUnits, in_units as in_units, unit_of as unit_of

__all__: list[str]
