"""TriAttention: which entries a budget keeps, from the scores to the rounds in which the others go."""
