"""The trainer: hosts, TRAIN, AWP and averaging in one loop that resumes to the bit."""
