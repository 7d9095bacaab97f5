"""The offline mismatch study: a server samples, the learner scores, dtype by dtype.

Everything is kept in the study's folder, studies/NAME/, and the same command measures only the dtypes that
it lacks:
    study.json           the settings and versions that its results belong to
    DTYPE/scored.jsonl   one sequence per line, with both engines' log-probs
    DTYPE/result.json    its metrics, and the comparison of hidden states
    result.json, mismatch.png, layers.png
"""
