"""Where spans are stored, and how these places are spoken to."""
