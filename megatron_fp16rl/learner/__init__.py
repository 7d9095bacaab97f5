"""The learner: Megatron-core with FP16 parameters, fp32 main parameters and one loss scaler."""

from megatron_fp16rl.learner.learner import Learner, Outcome

__all__ = ["Learner", "Outcome"]
