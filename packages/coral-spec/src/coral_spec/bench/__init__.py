"""Measure ways of decoding against each other on the same prompts, on the same machine, in the same run."""
