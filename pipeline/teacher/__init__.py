"""Stage 1: the teacher looks at every image once, and its knowledge goes into a cache."""
