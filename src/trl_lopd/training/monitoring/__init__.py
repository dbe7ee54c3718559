"""What is seen of a training run, and what ends it before its time."""
