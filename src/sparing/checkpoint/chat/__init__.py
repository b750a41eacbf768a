"""Chat templates of others, run with bounds on all that they may do."""
