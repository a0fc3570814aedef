"""Any causal language model: loading, sampling, exact KL to the base, prior benchmarks. Knows no experiment."""
