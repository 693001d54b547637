"""Speed and memory against named peers: `python -m benchmarks.scan`, `.train_step`, `.data`."""
