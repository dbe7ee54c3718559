"""Monitoring of a training run: console, metrics, drift and reporters, and failures that end it early."""
