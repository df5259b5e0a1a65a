"""Skips or stops at bad updates, records them, and replays a record."""
