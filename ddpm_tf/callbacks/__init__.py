"""What happens between two steps: progress, metrics, checkpoints, sample grids, signals, skipped steps."""
