"""Placeholder until the public contract lands."""
