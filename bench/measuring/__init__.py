"""How work is measured: clocks, failures, lost processes and records."""
