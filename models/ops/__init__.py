"""The two operations that are slow in plain PyTorch: the selective scan and the causal convolution."""
