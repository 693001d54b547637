"""Configs of `python -m vlm.train`: Python files whose `get_config()` returns a list of runs."""
