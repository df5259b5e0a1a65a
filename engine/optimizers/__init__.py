"""Several optimizers behind one interface, and optimizers with modes of their own."""
