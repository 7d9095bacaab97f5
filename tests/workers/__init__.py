"""What the ranks of a test do; see tests/rank.py."""
