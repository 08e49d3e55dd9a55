"""How a volume is reached: iSCSI targets, one per attached volume, behind one interface.

`target` is the interface and its words, `names` the identities, `tgt` exports through tgtd, `tgt_daemon` runs a private
tgtd. Nothing here knows the database: a caller says what an export shall be, and asks what is there.
"""

from iscsi.target import Connection, Credentials, Export, Target, TargetError

__all__ = ["Connection", "Credentials", "Export", "Target", "TargetError"]
