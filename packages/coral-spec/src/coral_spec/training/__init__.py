"""Training drafters: the target answers prompts (`data`), a drafter learns to predict its features (`trainer`)."""
