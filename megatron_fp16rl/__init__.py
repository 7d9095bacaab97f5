"""Recipes for FP16 reinforcement learning of large language models on Megatron-core and SGLang."""

__version__ = "0.1.0"
