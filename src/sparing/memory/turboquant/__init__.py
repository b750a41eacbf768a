"""TurboQuant: codes of a few bits, from the definition to the storage that attention reads."""
