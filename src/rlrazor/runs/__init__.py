"""From specs to a folder of finished runs: records, the store, the sweep, settings, the runner. Knows no experiment."""
