#!/bin/sh
# Runs in the test kernel, where / is the host's root under a tmpfs and /run/job the job's directory: finishes what a
# boot would do, then runs the job's command. Its output and exit code are files that the host watches.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
job=/run/job
. $job/settings
mkdir -p /dev/pts /run/lock /run/lvm /run/tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /run/tmp
ln -sf /proc/self/fd /dev/fd
echo test-kernel >/proc/sys/kernel/hostname
ip link set lo up
ulimit -c 0
# The host makes `hung` when its patience has ended: what is blocked, and where in the kernel?
{
    until [ -e $job/hung ]; do sleep 1; done
    echo w >/proc/sysrq-trigger
    dmesg >$job/kernel.log
    mv $job/kernel.log $job/results
} &
setsid sh $job/command.sh >$job/output 2>&1 </dev/null
status=$?
dmesg >$job/results/kernel.log
echo $status >$job/status.new
mv $job/status.new $job/status
sync
