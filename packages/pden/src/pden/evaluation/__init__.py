"""Accuracy on domains, selections by name, tables and charts."""
