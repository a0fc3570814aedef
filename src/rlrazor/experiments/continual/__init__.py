"""Several new tasks, one after another: what is forgotten of the earlier ones, and of the task before them all."""
