"""What a call of a model is recorded as."""
