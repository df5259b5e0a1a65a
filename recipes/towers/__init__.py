"""Towers by name: built in, of libraries, or of the caller's own code."""
