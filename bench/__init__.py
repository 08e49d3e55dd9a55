"""Benchmarks. `python -m bench` runs them all, prints tables and keeps each one's last in bench/RESULTS.md.

The machines are shared and noisy: what is compared is measured in one run, in rounds that alternate, and told as a
ratio of medians. Figures of different runs say little beside one another.
"""
