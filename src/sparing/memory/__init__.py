"""What a model remembers about a sequence, and how: stage, attend, commit."""
