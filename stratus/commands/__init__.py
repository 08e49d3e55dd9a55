"""A file for each command; its `main` is the entry point."""
