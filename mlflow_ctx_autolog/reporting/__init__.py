"""What the calls of a trace came to, why some were repeated, and how it is shown."""
