"""Fast functions on arrays, each beside a slow and obvious twin with the same signature."""
