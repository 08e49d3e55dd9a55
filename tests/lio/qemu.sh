#!/bin/sh
# virtiofsd's path, its socket, and qemu's argv: qemu, with a virtiofsd that serves it the host's root.
daemon=$1
socket=$2
shift 2
"$daemon" --socket-path="$socket" --thread-pool-size=4 -o source=/ -o cache=always -o sandbox=chroot -o log_level=err &
until [ -S "$socket" ]; do
    kill -0 $! || exit 1
    sleep 0.05
done
exec "$@"
