"""A real Linux kernel of our own for tests of LIO, LVM and the kernel's initiator; docs/testing.md says how to use it.

`kernel` runs a command in it, an engine (`uml`, `qemu`) is what the kernel runs in, `guest.sh` is the first thing that
runs in it, and the tests that run there are in `inside/`.
"""
