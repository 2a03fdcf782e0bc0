"""The losses that TRAIN goes into. Each host is one short file that owns its start, its attack and its loss."""
