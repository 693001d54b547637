"""`python -m vlm.demo RUN_A RUN_B`: ask two trained VLMs the same; see where each one looked and wrote."""
