"""A run's page: what happened, in pictures, in one file."""
