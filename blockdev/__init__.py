"""What every room needs from the host: commands, locks, sizes, extents and durable files. Standard library only."""
