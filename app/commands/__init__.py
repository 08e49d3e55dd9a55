"""The commands of `stratus-storage`, a module for each group; what they need is loaded when they run."""
