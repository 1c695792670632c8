"""A run on disk: its folder, checkpoints, settings and metrics, and where it goes on. Nothing of models or training."""
