"""Both VLMs, tiny, on easy-VQA, whose pictures pip installs. README.md has the results."""
