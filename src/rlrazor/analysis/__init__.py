"""Reads tables of records: laws of forgetting, forecasts, frontiers, paired statistics. Knows no torch."""
