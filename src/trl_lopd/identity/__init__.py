"""Who a model is: fingerprints, the cards that carry them, and whether a table is of the right teacher."""
