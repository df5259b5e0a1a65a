"""Evaluations during training, retrieval metrics, probes, early stopping."""
