"""Schedules, clipping, diagnostics, averages of weights, parameter groups."""
