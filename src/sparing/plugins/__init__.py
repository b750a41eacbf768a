"""Mechanisms of this library inside programs of others. The only modules that import them."""
