"""A span as a plain record: its attributes' names, what of it may leave, and how it is encoded."""
