"""Integrations with model libraries. Each one imports its library, so import the one that you need by name."""
