"""Weights from and to other programs' files, read as data only."""
