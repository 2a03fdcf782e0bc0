"""One module per verb; each has `run`, a typer command that imports what is heavy only when called."""
