"""``python -m train_adv``."""

from train_adv.cli import main

main()
