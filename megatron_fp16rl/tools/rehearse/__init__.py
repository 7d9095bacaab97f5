"""A large recipe, rehearsed on a machine without GPUs: a small copy of it, run by the same code.

shrink.py    the small recipe: a tiny model of the family, the layout folded, a small batch
run.py       start, kill, resume, export
checks.py    what is verified on the way; resume.py: whether the optimizer went on where it stood
"""
