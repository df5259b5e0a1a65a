"""Throughput, waiting for data, profiles."""
