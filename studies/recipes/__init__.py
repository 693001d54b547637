"""Published results on this code: a sweep per file, with the numbers that it should give."""

GOAL = "goal: ≥ 0.99"  # in `PUBLISHED`, where a paper's model solves the task and no number of its is quoted
