"""The compile gate: what every kernel compiles to, read without a GPU."""
