"""Evaluation of models, metrics, inspection of models and tables, and reports of runs."""
