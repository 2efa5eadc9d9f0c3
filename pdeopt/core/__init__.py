"""What everything stands on: errors, options, records of a run, tensors that alias vectors, derivatives, teams."""

from pdeopt.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
