"""The scored table: its columns, what makes a row valid, and how long computations write one to disk."""
