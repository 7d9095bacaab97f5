"""The offline mismatch study: a server samples, the learner scores, dtype by dtype.

Everything is kept in the study's folder, studies/NAME/, and the same command goes on from there:
    study.json           what was asked, and of which versions
    DTYPE/samples/       what the server sampled, kept as a run's rollouts/ are
    DTYPE/hidden/        the server's hidden states of a few sequences, until they are compared
    DTYPE/scored.jsonl   a sequence a line, with both engines' log-probs
    DTYPE/layers.json    the comparison of hidden states
    result.json, report.html, mismatch.png, layers.png
"""
