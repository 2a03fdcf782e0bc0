"""The progressive loop: pre-train, expand, fine-tune; the safety gate; baselines in the same harness."""
