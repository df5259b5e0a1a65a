"""Losses built from other losses."""
