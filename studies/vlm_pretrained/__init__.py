"""The quick start of the VLMs with three seeds. README.md has the results."""
