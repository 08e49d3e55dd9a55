"""Drift made behind the service's back: printed by a dry run, mended by a reconcile, fenced where it is dangerous."""
