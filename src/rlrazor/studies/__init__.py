"""Studies: a question, what is run for it, and the part of the report that answers it."""
