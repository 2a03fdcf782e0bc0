"""Attacks: one layer of project / step / random start, one loop for PGD, and APGD."""
