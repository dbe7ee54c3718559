"""Whether it worked and what changed: evaluation, metrics, inspection of tables, reports of runs."""
