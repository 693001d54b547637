"""Synthetic in-context retrieval tasks, and the trainer that shows which architecture learns them."""
