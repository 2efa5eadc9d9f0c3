from pdeopt.steps.exchange.gpuaware import MessageSettings as MessageSettings, is_gpu_aware as is_gpu_aware
from pdeopt.steps.exchange.neighbors import Neighbors as Neighbors

__all__: list[str]
