"""How robust a checkpoint is: named attacks on a test split, with intervals, restartable."""
