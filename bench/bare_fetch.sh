#!/bin/bash
# What an operator's script does to have a verified image, durable on the disk:
#
#     bare_fetch.sh URL COMPRESSION DIGEST HASHER FILE [QCOW2]
#
# COMPRESSION is raw, gz or zst; DIGEST the SHA-256 of what is kept in FILE; HASHER sha256sum, or openssl for
# `openssl dgst`, which knows the CPU's own instructions everywhere. With QCOW2, that is made of FILE, too.
set -euo pipefail
url=$1 compression=$2 digest=$3 hasher=$4 file=$5 qcow2=${6:-}

decompressed() {
    case $compression in
        raw) cat ;;
        gz) gzip -d ;;
        zst) zstd -q -d ;;
    esac
}

hashed() {
    case $hasher in
        sha256sum) sha256sum ;;
        openssl) openssl dgst -r -sha256 ;;
    esac
}

if [ "$compression" = raw ]; then
    got=$(curl --silent --fail "$url" | tee "$file" | hashed)
else
    got=$(curl --silent --fail "$url" | decompressed | tee "$file" | hashed)
fi
[ "${got%% *}" = "$digest" ]
sync "$file"
[ -n "$qcow2" ] || exit 0
qemu-img convert -f raw -O qcow2 "$file" "$qcow2"
sync "$qcow2"
