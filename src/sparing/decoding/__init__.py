"""Decoders are generators of events; nobody downstream needs to know which one is running."""
