"""What does a Mamba's state hold, with and without knowing the query? README.md has the answers."""
