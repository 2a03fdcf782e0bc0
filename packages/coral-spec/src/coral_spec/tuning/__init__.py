"""Which tree pays on this machine: what rounds cost, what they are expected to give, and the choice."""
