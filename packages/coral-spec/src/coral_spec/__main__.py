"""``python -m coral_spec``."""

from coral_spec.cli import main

main()
