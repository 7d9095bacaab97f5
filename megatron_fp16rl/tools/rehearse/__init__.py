"""A large recipe, rehearsed on a machine without GPUs: a small copy of it, run by the same code.

shrink.py        the small recipe: layout, batch, settings
small_model.py   the small model's configuration; model, tokenizer and problems on disk
run.py           start, kill, resume, compare with transformers
checks.py        what is verified, and resume.py: whether the optimizer went on where it stood
"""
