"""LossGuard, its records of bad updates, and their replay."""
