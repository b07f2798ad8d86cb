#!/bin/bash
# Boots the guest kernel under QEMU and lets a small /init try everything husk needs of it.
#
#   check-kernel.sh [VMLINUX]             one line a check; exit code 1 when something is missing
#   check-kernel.sh --profile [VMLINUX]   where the boot's time goes: the 25 slowest initcalls
#
# QEMU's microvm machine is what husk-vmm's is like: PVH entry, hardware-reduced ACPI, virtio-mmio, no PCI. It is
# emulated in software, so this runs anywhere and takes some seconds; do not compare its times with those of KVM.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
profile=no
if [ "${1:-}" = --profile ]; then
    profile=yes
    shift
fi
vmlinux=${1:-${HUSK_TARGET:-$here/../target}/guest/vmlinux}

die() {
    printf 'check-kernel: error: %s\n' "$*" >&2
    exit 2
}

[ -f "$vmlinux" ] || die "no kernel at $vmlinux; run guest-image/build-kernel.sh"
for tool in qemu-system-x86_64 gcc; do
    command -v $tool >/dev/null || die "$tool is not installed (apt-get install qemu-system-x86 gcc libc6-dev)"
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
gcc -std=gnu11 -O2 -Wall -Wextra -static -o "$work/init" "$here/check/init.c" "$here/check/network.c"
"$here/build-initramfs.sh" "$work/init" "$work/check.cpio" >/dev/null
truncate -s 1M "$work/disk"
# Under KVM the guest learns its clock rate from kvmclock. Software emulation has neither that nor anything to
# measure by, but its time stamp counter is the host's.
tsc_khz=$(gcc -O2 -o "$work/tsc" "$here/check/tsc.c" && "$work/tsc")

# boot LOG ARGUMENTS…: runs the guest until it ends by itself. QEMU's exit code is not 0 when it had to be stopped.
boot() {
    local log=$1
    shift
    # The disk, net and other devices are there to see their drivers take them; each needs its own transport.
    timeout --foreground 120 qemu-system-x86_64 \
        -M microvm,acpi=on,rtc=off,pit=off,pic=off,isa-serial=on -accel tcg -cpu max -smp 2 -m 768 \
        -nodefaults -no-user-config -display none -no-reboot -serial "file:$log" \
        -kernel "$vmlinux" -initrd "$work/check.cpio" -append "console=ttyS0 panic=-1 tsc=reliable tsc_early_khz=$tsc_khz $*" \
        -device virtio-rng-device -device virtio-balloon-device,free-page-reporting=on \
        -drive "file=$work/disk,if=none,id=disk,format=raw" -device virtio-blk-device,drive=disk \
        -netdev user,id=net,restrict=on -device virtio-net-device,netdev=net </dev/null
}

if [ $profile = yes ]; then
    boot "$work/log" "initcall_debug loglevel=8 log_buf_len=1M" || true
    grep -oE 'initcall [^ ]+ returned -?[0-9]+ after [0-9]+ usecs' "$work/log" |
        awk '{total += $6; print $6, $2} END {print total, "(all)"}' | sort -rn | head -n 26
    exit
fi

# The ways out: ACPI's sleep control register, and a triple fault as husk-vmm sees it.
for ending in poweroff reboot; do
    boot "$work/$ending" "quiet reboot=t husk.end=$ending" || {
        tail -n 40 "$work/$ending"
        die "the guest did not end by itself ($ending)"
    }
done
tr -d '\r' <"$work/poweroff" | grep -E '^(ok  |FAIL|init after|husk-check:)' || true
summary=$(tr -d '\r' <"$work/poweroff" | grep '^husk-check:') || {
    tail -n 40 "$work/poweroff"
    die "the guest ended before its checks did"
}
grep -q '^husk-check:' "$work/reboot" || die "the guest that reboots ended before its checks did"
echo "ok   power-off and reboot end the machine"
case $summary in *" 0 failed") ;; *) exit 1 ;; esac
