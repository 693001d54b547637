"""How many facts a state holds, against the recall scaling law of Mamba (arXiv 2609.07681)."""
