#!/bin/bash
# Builds the guest's PID 1 as one static file: target/x86_64-unknown-linux-gnu/agent/husk-agent.
#
# glibc with crt-static: the agent resolves no names and loads no modules, so nothing of glibc is missing then. The target is
# named because without one RUSTFLAGS would reach build scripts and proc macros too, which cannot be static.
set -euo pipefail

readonly TARGET=x86_64-unknown-linux-gnu
# The design's budget: the agent lies in every pod's memory.
readonly MAX_BYTES=$((4 * 1024 * 1024))

die() {
    printf 'guest agent: error: %s\n' "$*" >&2
    exit 1
}

# Packed, a relative relocation takes hardly more than a bit instead of 24 bytes: a quarter of a megabyte in all.
readonly FLAGS="-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs"

here=$(cd "$(dirname "$0")" && pwd)
target=${HUSK_TARGET:-$here/../target}
cd "$here/.."
RUSTFLAGS=$FLAGS \
    cargo build --locked --quiet -p husk-agent --profile agent --target "$TARGET" --target-dir "$target"

agent=$target/$TARGET/agent/husk-agent
if readelf -lW "$agent" | grep -q INTERP; then
    die "$agent asks for a dynamic loader: is libc.a installed (Debian: libc6-dev)?"
fi
bytes=$(stat -c %s "$agent")
[ "$bytes" -le "$MAX_BYTES" ] ||
    printf 'guest agent: warning: over the budget of %s bytes: every pod holds it in memory\n' "$MAX_BYTES" >&2
printf 'guest agent: %s bytes: %s\n' "$bytes" "$(realpath --relative-to="$PWD" "$agent")"
