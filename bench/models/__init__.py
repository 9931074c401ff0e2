"""Networks that the benchmarks run."""
