"""Training of a student on a scored table: the trainer, its rows, its objective and its monitoring."""
