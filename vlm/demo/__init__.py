"""`python -m vlm.demo [RUN_A RUN_B]`: ask two trained VLMs the same; see what each one read and wrote."""
