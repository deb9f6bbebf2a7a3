"""Measurements: results as tables and JSON."""
