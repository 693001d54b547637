"""Official metrics of the benchmarks, with the paper's own variants where they differ."""
