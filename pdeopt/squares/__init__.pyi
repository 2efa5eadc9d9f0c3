# Sums of squares of residuals.
from pdeopt.squares.residual import (
    ResidualFunction as ResidualFunction,
    RowSample as RowSample,
    SumOfSquares as SumOfSquares,
)
from pdeopt.squares.rows import density as density, draw_rows as draw_rows
from pdeopt.squares.share import Share as Share
from pdeopt.squares.sharedrows import SharedRows as SharedRows

# Running sums of products of samples.
from pdeopt.squares.gram import GramSum as GramSum, add_gram as add_gram, add_row_gram as add_row_gram
from pdeopt.squares.gramshares import GramShares as GramShares
from pdeopt.squares.sharedgrams import SharedGrams as SharedGrams

__all__: list[str]
