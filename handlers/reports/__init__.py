"""Curves of one run or several, as PNG files and an HTML page."""
