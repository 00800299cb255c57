"""Weights from and to the files of other programs. Reading a file never runs code from it."""
