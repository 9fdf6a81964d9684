"""Kernels of others, compiled from a folder that the user names. None of their code is here, only calls of it."""
