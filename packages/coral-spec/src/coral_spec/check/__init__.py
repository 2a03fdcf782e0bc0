"""Proof of losslessness on the user's own model: greedy ids against plain decoding, and sampled frequencies."""
