"""Short runs that leave no trace: a check of one batch, a dry run, overfitting one batch."""
