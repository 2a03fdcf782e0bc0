"""TRAIN: the relations between natural samples, kept as a standard model sees them (arXiv 2311.17607)."""
