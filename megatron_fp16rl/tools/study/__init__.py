"""The offline mismatch study: a server samples, the learner scores, dtype by dtype.

Everything is kept in the study's folder, studies/NAME/, and the same command resumes there:
    study.json           the settings and versions that its results belong to
    DTYPE/samples/       the server's samples, kept as a run's rollouts/ are
    DTYPE/hidden/        the server's hidden states of a few sequences, until they are compared
    DTYPE/scored.jsonl   one sequence per line, with both engines' log-probs
    DTYPE/layers.json    the comparison of hidden states
    result.json, mismatch.png, layers.png
"""
