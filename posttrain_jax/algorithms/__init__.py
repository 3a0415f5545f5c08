"""Algorithms, one file each; every file reads from top to bottom."""
