"""The two operations that are slow in plain PyTorch: the selective scan and the causal convolution."""

LANES = 16  # channels that fill a vector of the kernels; here, because `_simd.py` imports numba
