"""The work that is measured: ops at shapes, their least bytes and FLOPs, and their results in float64."""
