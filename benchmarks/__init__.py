"""Side-by-side measurements against peers; committed results lie in `benchmarks/results/`."""
