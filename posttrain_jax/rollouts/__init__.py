"""From prompts to scored trajectories: what algorithms that sample learn from."""
