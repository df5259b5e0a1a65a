"""Schedules, gradient clipping and diagnostics, weight averages, parameter groups."""
