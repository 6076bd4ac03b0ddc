"""Running and judging models: sessions, the float64 reference, parity, timing, diagnosis."""
