"""Training: run folders, checkpoints, optimizers, several processes."""
