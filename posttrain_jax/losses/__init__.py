"""Losses and log-probabilities: arrays in, arrays out; no model, no config, no randomness."""
