"""What `python -m benchmarks.cuda` measures, and how."""
