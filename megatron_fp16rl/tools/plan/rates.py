"""How much of a machine's peak is reached: the few numbers that the time model is fitted with.

`python -m megatron_fp16rl.tools.plan.fit` makes SHIPPED, and the tables of docs/planner.md, from public
measurements. What is written as a constant here or beside its use is assumed, not fitted.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiencies:
    """Shares of peaks, and one time.

    gemm      of the GPU's FLOP/s: linear layers and attention of the learner, prefill of the servers
    memory    of its memory bandwidth: decoding, the optimizer
    network   of links and network: collectives, weights on their way
    launch_s  seconds that the forward of one layer with experts takes at the least, however few the
              tokens: many small kernels, and the exchange of counts before that of tokens, for which the
              host waits. Backward takes twice as long. (Those of dense layers run ahead.)
    """

    gemm: float
    memory: float
    network: float
    launch_s: float


# What is believed before any row is looked at, and how firmly: a factor that is one standard deviation.
PRIOR = Efficiencies(gemm=0.4, memory=0.6, network=0.6, launch_s=2e-3)
PRIOR_FACTORS = Efficiencies(gemm=1.4, memory=1.4, network=1.3, launch_s=3.0)

SHIPPED = Efficiencies(gemm=0.394, memory=0.478, network=0.439, launch_s=0.00403)
