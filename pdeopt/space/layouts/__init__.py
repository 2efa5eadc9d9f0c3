"""Who owns which unknowns of a step, whose it sees beside them, and the messages between: rows over ranks."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
