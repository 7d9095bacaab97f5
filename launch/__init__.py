"""Starting runs: on this machine (local), and the entry point of every learner rank."""
