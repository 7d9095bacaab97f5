"""Rollouts: SGLang servers in the recipe's precision, and what the learner asks of them."""
