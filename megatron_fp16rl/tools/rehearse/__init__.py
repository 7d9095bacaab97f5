"""A large recipe, rehearsed on a machine without GPUs: shrunk, then run through the very same code.

shrink.py      the small recipe and the small model's configuration: pure functions
materials.py   what a rehearsal needs on disk: model, tokenizer, problems
run.py         start, sync, checkpoint, kill, resume, export
checks.py      what was proved, and how it is known
"""
