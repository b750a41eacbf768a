"""Numbers in fewer bits: formats of weights, rotations, codebooks, packed layouts."""
