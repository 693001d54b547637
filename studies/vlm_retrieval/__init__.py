"""Pretrained VLMs that look things up: layouts, patches, objects, families. README.md has the results."""
