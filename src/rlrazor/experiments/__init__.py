"""Experiments make records: each subpackage holds its data, policy and training loop."""
