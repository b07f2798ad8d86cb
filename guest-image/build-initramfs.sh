#!/bin/bash
# Packs the guest's whole user space: the static agent as /init, and the directories it mounts on.
#
#   build-initramfs.sh [AGENT [INITRAMFS]]
#
# AGENT defaults to target/x86_64-unknown-linux-gnu/agent/husk-agent, INITRAMFS to target/guest/initramfs.cpio.
# The archive is written here, header by header: device nodes then need neither root nor a staging directory,
# and the same agent always gives the same bytes. It stays uncompressed: unpacking is one copy in
# the guest, while any compression would cost guest CPU time to save a few host page-cache reads.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
target=${HUSK_TARGET:-$here/../target}
agent=${1:-$target/x86_64-unknown-linux-gnu/agent/husk-agent}
archive=${2:-$target/guest/initramfs.cpio}

die() {
    printf 'guest initramfs: error: %s\n' "$*" >&2
    exit 1
}

inode=0

# Pads what was written so far ($1 bytes) to a multiple of four.
pad() {
    head -c $(((4 - $1 % 4) % 4)) /dev/zero
}

# entry NAME MODE [SIZE [MAJOR MINOR]]: a header of the "newc" format: 13 fields of 8 hex digits (inode, mode, uid,
# gid, links, mtime, size, device, device, rdev major, rdev minor, length of the name with its NUL, checksum).
entry() {
    local name=$1 mode=$2 size=${3:-0} major=${4:-0} minor=${5:-0}
    inode=$((inode + 1))
    printf '070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\0' \
        $inode "$mode" 0 0 1 0 "$size" 0 0 "$major" "$minor" $((${#name} + 1)) 0 "$name"
    pad $((110 + ${#name} + 1))
}

directory() { entry "$1" $((0040000 | 0$2)); }
device() { entry "$1" $((0020000 | 0$2)) 0 "$3" "$4"; }
file() {
    local size
    size=$(stat -c %s "$3")
    entry "$1" $((0100000 | 0$2)) "$size"
    cat "$3"
    pad "$size"
}

contents() {
    directory dev 755
    # For the time before devtmpfs: the kernel opens the console as /init's stdio, and a Rust program without
    # stdio opens /dev/null or aborts.
    device dev/console 600 5 1
    device dev/null 666 1 3
    directory proc 555
    directory sys 555
    directory run 755
    directory tmp 1777
    file init 755 "$agent"
    entry 'TRAILER!!!' 0
}

[ -f "$agent" ] || die "no agent at $agent; build it with guest-image/build-agent.sh"
headers=$(readelf -lW "$agent" 2>/dev/null) || die "$agent is not an ELF program"
# There is no loader and no library in the guest: such an agent would die before its first instruction.
case $headers in *INTERP*) die "$agent is dynamically linked; guest-image/build-agent.sh links it statically" ;; esac

mkdir -p "$(dirname "$archive")"
partial=$archive.$$
trap 'rm -f "$partial"' EXIT
contents >"$partial"
# Whole pages: QEMU's microvm puts its ACPI tables behind the archive, in the page where it ends, and the guest
# then hangs or not by the archive's length. Zeros after the trailer mean nothing.
truncate -s %4096 "$partial"
mv "$partial" "$archive"
printf 'guest initramfs: %s bytes, agent %s bytes: %s\n' "$(stat -c %s "$archive")" "$(stat -c %s "$agent")" \
    "$(realpath --relative-to="$PWD" "$archive")"
