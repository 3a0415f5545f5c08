"""From prompts to scored answers: what algorithms that sample learn from."""
