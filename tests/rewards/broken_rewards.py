"""A module of reward functions that cannot be imported; named by a test, never imported by one."""

raise RuntimeError("the lexicon is damaged")
