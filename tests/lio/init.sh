#!/bin/sh
# Process 1 of a test kernel. It finds the host's root, lays a tmpfs over it, and runs guest.sh in there. A user-mode
# kernel starts it on the host's root itself, qemu from an initramfs whose file /modules lists what virtiofs needs.
# stratus_job is the job's directory on the host, from the kernel's command line.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
host=/mnt/host
root=/mnt/root

cover() { # directory, name: the host's directory appears in the new root, and may be written to
    mkdir -p "/mnt/upper/$2" "/mnt/work/$2" "$root$1"
    mount -t overlay -o "lowerdir=$host$1,upperdir=/mnt/upper/$2,workdir=/mnt/work/$2" overlay "$root$1"
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir $host
if [ -e /modules ]; then
    while read -r module; do insmod "/$module"; done </modules
    mount -t virtiofs host $host
else
    mount -t hostfs -o / host $host
fi
. "$host$stratus_job/settings"
release=$(uname -r)
insmod "$host$modules/kernel/fs/overlayfs/overlay.ko"
if cover / root; then
    mount --bind /proc $root/proc
    mount --bind /sys $root/sys
    mount -t tmpfs -o mode=755 tmpfs $root/run
    mkdir -p "$root/lib/modules/$release" $root/run/job
    mount --bind "$host$modules" "$root/lib/modules/$release"
    mount --bind "$host$stratus_job" $root/run/job
    mount -t devtmpfs devtmpfs $root/dev
    mkdir -p $root/dev/shm
    mount -t tmpfs tmpfs $root/dev/shm
    # What the kernel wants loaded by itself, it asks for in here, outside of the new root.
    printf '#!/bin/sh\nexec chroot %s /sbin/modprobe "$@"\n' $root >/mnt/modprobe
    chmod 755 /mnt/modprobe
    echo /mnt/modprobe >/proc/sys/kernel/modprobe
    number=0
    IFS=:
    for place in $places; do
        number=$((number + 1))
        cover "$place" "place$number"
    done
    # In a mount namespace whose root this is: who was only chrooted can make no user namespace, and so no sandbox.
    unshare -m sh -c "cd $root && mount -n --move . / && exec chroot . /bin/sh /run/job/guest.sh"
fi
sync
echo o >/proc/sysrq-trigger
sleep 60
