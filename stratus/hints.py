"""What a user can do about a problem, by its code."""

from __future__ import annotations

from collections.abc import Mapping

SIGN_IN = "sign in with --token-file FILE (STRATUS_TOKEN_FILE), or with --username and --password-file"
_NEW_TOKEN = f"get a new token, then {SIGN_IN}"
_SHOW = "stratus-describe-volumes ID"
_DETACH = "detach it first: stratus-detach-volume ID"
_WAIT = "wait for it; stratus-describe-operations shows what is going on"
_SPACE = "delete what is no longer needed, choose another --pool, or ask an admin to make room"
_TRY_AGAIN = "the storage service is restarting or has trouble; try again, and tell an admin if it stays so"
_POLICY = "see which rule refuses it with: stratus-policy-image REF"
_PUBLISHER = "the bytes, or what is said about them, are wrong: tell who publishes the image"
_STANDALONE = "make it stand alone with: qemu-img convert -O qcow2 OLD NEW"
_ADMIN = "tell an admin; the log of the service says more"

HINTS: Mapping[str, str] = {
    "not-signed-in": SIGN_IN,
    "token-invalid": f"is it the token of this service? If not, {SIGN_IN}",
    "token-expired": _NEW_TOKEN,
    "token-revoked": _NEW_TOKEN,
    "password-invalid": "check --username and --password-file, or use a token: --token-file FILE",
    "account-disabled": "ask an admin",
    "admin-only": "ask an admin",
    "nodes-only": "ask an admin",
    "not-owner": "ask the owner, or an admin",
    "not-this-node": "use the name and the initiator that are registered for the node; an admin changes them",
    "not-your-connection": "only who attached the volume reads its connection; ask them to",
    "volume-not-found": "list those you may see with: stratus-describe-volumes",
    "snapshot-not-found": "list those you may see with: stratus-describe-snapshots",
    "attachment-not-found": "list those you may see with: stratus-describe-attachments",
    "volume-in-use": f"see who holds it with: {_SHOW}; {_DETACH}",
    "volume-busy": _WAIT,
    "volume-not-available": f"see its state with: {_SHOW}",
    "shrink-refused": "to have a smaller volume, create one and copy the files",
    "size-too-small": "leave out -s to have the size of the source",
    "size-too-large": "choose a smaller size, or another --pool",
    "pool-mismatch": "leave out --pool",
    "snapshot-needs-detach": _DETACH,
    "clone-needs-detach": _DETACH,
    "snapshot-busy": _WAIT,
    "snapshot-not-available": "see its state with: stratus-describe-snapshots ID",
    "snapshot-of-another": "list the volume's own with: stratus-describe-snapshots --volume ID",
    "quota-exceeded": "delete volumes or snapshots you no longer need, or ask an admin for a larger quota",
    "pool-full": _SPACE,
    "pool-low-space": _SPACE,
    "pool-overcommitted": _SPACE,
    "pool-unusable": "choose another --pool, or tell an admin",
    "pool-failed": _ADMIN,
    "backing-missing": _ADMIN,
    "size-mismatch": _ADMIN,
    "direct-attach-disabled": "this site lets only its nodes attach volumes; ask an admin about direct attachments",
    "initiator-of-a-node": "use the initiator name of your own machine: /etc/iscsi/initiatorname.iscsi",
    "initiator-attached": "read the connection again with: stratus-describe-attachments ID --connection",
    "read-only-access": "attach it with --mode ro, or ask the owner to share it with --mode rw",
    "mutual-chap-taken": "leave out --mutual-chap",
    "attached-by-another": "ask who attached it, or an admin",
    "force-required": "give --force if you are sure that the machine no longer needs it",
    "attachment-ended": "attach the volume again: stratus-attach-volume",
    "precondition-failed": "it was changed meanwhile: look at it and try again",
    "idempotency-in-flight": "the first request is still being worked on: wait for a moment",
    "image-not-found": "list those you may see with: stratus-describe-images",
    "bad-reference": "give a Marketplace identifier (27 characters), or the http(s) address of an entry or an image",
    "no-image-entry": "nobody endorses it: give --checksum sha256:HEX if you know what it must be",
    "bad-metadata": _PUBLISHER,
    "bad-signature": _PUBLISHER,
    "bad-checksum-file": _PUBLISHER,
    "policy-refused": _POLICY,
    "bad-url": "http and https only, with nothing else in front of the host",
    "address-refused": "it is in a private network: an admin can allow that one (images.allow_networks)",
    "too-many-redirects": "give the address it ends at",
    "unreachable": "is the address right? If its server is down, try again later",
    "wrong-digest": _PUBLISHER,
    "wrong-size": _PUBLISHER,
    "truncated": _PUBLISHER,
    "bad-compression": "is it compressed as was said? See --compression of stratus-upload-image",
    "image-too-large": "ask an admin for a larger limit (images.max_size)",
    "bad-format": "raw and qcow2 are accepted, as was said: see --image-format of stratus-upload-image",
    "has-backing-file": _STANDALONE,
    "has-data-file": _STANDALONE,
    "has-internal-snapshots": _STANDALONE,
    "encrypted-image": "an image is for many machines: decrypt it first",
    "unknown-features": _STANDALONE,
    "damaged-image": "see what is wrong with: qemu-img check FILE",
    "sandbox-failed": _ADMIN,
    "image-cache-full": "delete images that are no longer needed, or ask an admin to make room",
    "image-cache-unusable": _ADMIN,
    "image-not-available": "see its state with: stratus-describe-images ID",
    "image-pinned": "machines, volumes or pins need it: stratus-pin-image ID --list shows them to an admin",
    "too-many-asks": "see what is still to come with: stratus-describe-operations",
    "image-not-receiving": "see its state with: stratus-describe-images ID",
    "upload-no-room": "try again later, or ask an admin to make room",
    "upload-busy": "another stratus-upload-image is sending it",
    "transfers-busy": "try again in a moment",
    "image-not-cached": "have it again with: stratus-create-image REF",
    "target-unavailable": _TRY_AGAIN,
    "target-limit": "the host of the service has no room for another attached volume; tell an admin",
    "target-failed": _ADMIN,
    "database-busy": _TRY_AGAIN,
    "not-ready": _TRY_AGAIN,
    "internal-error": _ADMIN,
}
