"""Probes of hidden states, step sizes, attention and causal paths (in preparation)."""
