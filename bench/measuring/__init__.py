"""How work is measured: the clock, failures, processes that are lost, and the records of it all."""
