"""Every stratus-* command against the real service: what it prints, its formats, its exit codes, and real I/O."""
