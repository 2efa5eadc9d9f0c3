from pdeopt.space.layouts.layout import Layout as Layout, extended as extended, without_messages as without_messages
from pdeopt.space.layouts.matrix import spread_aij as spread_aij
from pdeopt.space.layouts.partition import (
    row_ranks as row_ranks,
    parts_layout as parts_layout,
    Patch as Patch,
    grid_layout as grid_layout,
    pattern_layout as pattern_layout,
)

__all__: list[str]
