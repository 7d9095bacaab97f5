"""Benchmarks. What is told from them are ratios within one run, because machines differ and drift."""
