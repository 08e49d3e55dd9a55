#!/bin/sh
# What an operator's script does to give a machine a volume and take it back, CYCLES times:
#
#     bare_cycle.sh CONTROL TID CYCLES SIZE DIRECTORY
#
# TGT_IPC_SOCKET names the tgtd; its control number is CONTROL. It records nothing, checks nothing and cannot be
# interrupted; the backing is as durable as ours.
set -eu
control=$1 tid=$2 cycles=$3 size=$4 directory=$5
file=$directory/$tid.raw
initiator=iqn.2004-10.com.example:bench
user=user$tid
params=scsi_id=6000000000000000000000000000$((1000 + tid)),scsi_sn=serial$tid,vendor_id=BARE,thin_provisioning=1

tgt() {
    tgtadm -C "$control" --lld iscsi "$@" >/dev/null
}

while [ "$cycles" -gt 0 ]; do
    # create
    truncate -s "$size" "$file"
    sync "$file" "$directory"
    # attach
    tgt --op new --mode target --tid "$tid" --targetname "iqn.2004-10.com.example:bare.$tid"
    tgt --op new --mode logicalunit --tid "$tid" --lun 1 --backing-store "$file" --bstype rdwr
    tgt --op update --mode logicalunit --tid "$tid" --lun 1 --params "$params"
    tgt --op new --mode account --user "$user" --password 0123456789abcdef
    tgt --op bind --mode account --tid "$tid" --user "$user"
    tgt --op bind --mode target --tid "$tid" --initiator-name "$initiator"
    # detach
    tgt --op unbind --mode target --tid "$tid" --initiator-name "$initiator"
    tgt --op unbind --mode account --tid "$tid" --user "$user"
    tgt --op show --mode conn --tid "$tid"
    tgt --op delete --mode logicalunit --tid "$tid" --lun 1
    tgt --op delete --mode target --tid "$tid"
    tgt --op delete --mode account --user "$user"
    # delete
    rm "$file"
    sync "$directory"
    cycles=$((cycles - 1))
done
