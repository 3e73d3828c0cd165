"""Teacher and student networks: the built-in ones, and references to any other."""
