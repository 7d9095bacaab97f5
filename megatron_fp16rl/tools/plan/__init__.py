"""What a recipe takes, before anything is submitted: memory of each rank, time of a step."""
