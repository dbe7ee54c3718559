"""From a scored table to a trained student: the trainer, its rows, its objective and what watches it."""
