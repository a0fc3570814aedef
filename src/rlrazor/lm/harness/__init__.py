"""lm-evaluation-harness, used as it is, without its downloads and its noise."""
