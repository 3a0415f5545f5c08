"""From tokens to log-probabilities and scores: policy, reference, completions."""
