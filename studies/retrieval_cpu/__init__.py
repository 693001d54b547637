"""Who learns to look up a position, how far, and at what cost? README.md has the answers."""
