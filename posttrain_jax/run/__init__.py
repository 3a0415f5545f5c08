"""The one loop, its checkpoints, metrics and samples page; it knows no algorithm."""
