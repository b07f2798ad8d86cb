#!/bin/bash
# Builds the guest kernel: target/guest/vmlinux, from Debian's linux-source-6.12, kernel/*.config and
# kernel/patches/.
#
# The result is cached under the hash of everything it depends on, so a second run costs a copy. A build
# happens in a scratch directory that is renamed into the cache when it is complete: an interrupted
# build leaves nothing that looks like a kernel. The source tree (2 GB) is deleted afterwards.
#
#   HUSK_CACHE     where kernels are kept (default ~/.cache/husk)
#   HUSK_TARGET    where vmlinux goes     (default <repository>/target)
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${HUSK_CACHE:-$HOME/.cache/husk}/kernel
out=${HUSK_TARGET:-$here/../target}/guest
source_package=linux-source-6.12

say() { printf 'guest kernel: %s\n' "$*"; }
die() {
    printf 'guest kernel: error: %s\n' "$*" >&2
    exit 1
}

# Installs what the build needs and this machine lacks.
install_tools() {
    local package missing=()
    for package in "$source_package" gcc make patch flex bison bc cpio xz-utils binutils libelf-dev libssl-dev; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    [ "$(id -u)" -eq 0 ] || die "missing packages; install them as root: apt-get install ${missing[*]}"
    say "installing ${missing[*]}"
    apt-get update -q >"$cache/apt.log" 2>&1 || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >>"$cache/apt.log" 2>&1 ||
        die "apt-get could not install ${missing[*]} ($cache/apt.log); on Debian 12 $source_package comes from bookworm-security or bookworm-backports"
}

# One line for each input that decides what comes out: change any and the kernel is built anew.
inputs() {
    echo "source $(dpkg-query -W -f '${Version}' "$source_package")"
    gcc --version | head -n 1
    ld --version | head -n 1
    (cd "$here" && sha256sum build-kernel.sh kernel/*.config kernel/patches/*.patch)
}

# Fills the tree's .config: the fragments, and no to everything else. That is tinyconfig's own method, and
# unlike merging into a finished tinyconfig it says no to options that only our choices make visible as well.
configure() {
    local tree=$1 file line number option lost=0
    cat "$here"/kernel/*.config >"$tree/husk.config"
    make -s -C "$tree" ARCH=x86_64 KCONFIG_ALLCONFIG="$tree/husk.config" allnoconfig >"$tree/husk.log" 2>&1 || {
        cat "$tree/husk.log" >&2
        die "kconfig failed"
    }
    for file in "$here"/kernel/*.config; do
        number=0
        while IFS= read -r line; do
            number=$((number + 1))
            case $line in CONFIG_*) ;; *) continue ;; esac
            grep -qxF -- "$line" "$tree/.config" && continue
            option=${line%%=*}
            printf '%s:%d: %s did not survive: the kernel has "%s"\n' "${file#"$here"/}" "$number" "$line" \
                "$(grep -E "^(# )?${option}[ =]" "$tree/.config" || echo "$option not available")" >&2
            lost=1
        done <"$file"
    done
    [ $lost -eq 0 ] || die "the options above need another option, or do not exist in this kernel"
}

# Builds in $1; what is worth keeping ends up in $1/result.
build() {
    local scratch=$1 tree=$1/$source_package started=$SECONDS patch
    # Most of the tree is headers of graphics drivers; kconfig wants only their Kconfig files.
    tar -C "$scratch" -xf "/usr/src/$source_package.tar.xz" --exclude="$source_package/drivers/gpu/*.[ch]"
    for patch in "$here"/kernel/patches/*.patch; do
        patch -s -d "$tree" -p1 <"$patch" || die "${patch#"$here"/} does not apply to this version; see whether it still needs it"
    done
    configure "$tree"
    say "building with $(nproc) jobs (a few minutes, once; log: $cache/build.log)"
    # The same inputs give the same bytes: no build date, user or host name in the image.
    KBUILD_BUILD_TIMESTAMP="$(LC_ALL=C date -u -r "/usr/src/$source_package.tar.xz")" KBUILD_BUILD_USER=husk KBUILD_BUILD_HOST=husk \
        make -s -C "$tree" ARCH=x86_64 -j"$(nproc)" vmlinux >"$cache/build.log" 2>&1 || {
        grep -n -m 20 -E 'error|Error|undefined' "$cache/build.log" >&2 || tail -n 20 "$cache/build.log" >&2
        die "the build failed: $cache/build.log"
    }
    # Symbols for a panic's call trace are in the image itself (KALLSYMS).
    strip --strip-all -o "$scratch/result/vmlinux" "$tree/vmlinux"
    # The entry point a VMM jumps to is an ELF note named Xen, type 18.
    readelf -n "$scratch/result/vmlinux" 2>/dev/null | grep '0x00000012' >/dev/null || die "vmlinux has no PVH entry note"
    cp "$tree/.config" "$scratch/result/config"
    make -s -C "$tree" ARCH=x86_64 kernelrelease >"$scratch/result/release"
    echo $((SECONDS - started)) >"$scratch/result/seconds"
}

mkdir -p "$cache" "$out"
install_tools
hash=$(inputs | sha256sum | cut -c 1-16)
result=$cache/$hash
exec 9>"$cache/lock"
flock -n 9 || {
    say "waiting for another build"
    flock 9
}

state="cached"
if [ ! -d "$result" ]; then
    rm -rf "$cache"/building.*  # left by a build that was killed: we hold the lock
    scratch=$(mktemp -d "$cache/building.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    mkdir "$scratch/result"
    build "$scratch"
    inputs >"$scratch/result/inputs"
    mv -T "$scratch/result" "$result"
    state="built"
fi

# An unchanged file keeps its time stamp, and a running VMM the one it opened.
if ! cmp -s "$result/vmlinux" "$out/vmlinux"; then
    cp "$result/vmlinux" "$out/.vmlinux.$$"
    mv "$out/.vmlinux.$$" "$out/vmlinux"
fi
say "$(cat "$result/release"), $(grep -c '^CONFIG_.*=[ym]' "$result/config") options, $(stat -c %s "$result/vmlinux") bytes, $state ($(cat "$result/seconds") s to build): $(realpath --relative-to="$PWD" "$out/vmlinux")"
