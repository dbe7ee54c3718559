"""EffOPD: fewer training steps by extrapolating the weights along the direction of training."""
