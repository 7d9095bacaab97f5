"""Hugging Face weights to Megatron shards and back: one mapping table a family, both directions."""
