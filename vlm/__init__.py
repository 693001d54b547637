"""Vision & language models: Mamba-VL and Pythia-VL (Pantazopoulos et al., EMNLP 2024, arXiv:2409.05395)."""
