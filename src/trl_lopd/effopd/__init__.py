"""EffOPD: fewer steps, by following the direction that a few of them took."""
