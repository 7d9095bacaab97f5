"""fp16rl selftest: does FP16 RL compute what it should on this machine? A row a question.

A row is a function that returns checks (result.py); rows.py lists them; run.py runs each in a process of its own.
"""
