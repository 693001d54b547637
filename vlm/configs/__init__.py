"""Configs of `python -m vlm.train`: Python files whose get_config() returns vlm.config.Run's."""
