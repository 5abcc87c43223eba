"""Calls of models: their spans, and which of their content may leave the process."""
