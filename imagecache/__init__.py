"""Images: from a reference to a verified, immutable qcow2 in a directory. Knows nothing of users, operations or pools.

    reference ──resolve──▶ entries ──policy──▶ one that passed ──fetch──▶ bytes with the right digest
              ──inspect──▶ what they claim to be, nothing more ──flatten──▶ a fresh qcow2 ──commit──▶ the cache

Whatever is read on the way was written by a stranger: names, metadata, archives, disks.
"""
