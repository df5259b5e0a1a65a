"""Losses that take a teacher's outputs or scores as their target."""
