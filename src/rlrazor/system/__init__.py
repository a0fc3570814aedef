"""The machine under everything: files, processes, signals, the terminal. Knows nothing of models or of records."""
