"""The compile gate: compiles every kernel without a GPU and reads the machine code."""
