# shellcheck shell=bash
# Variables are set here for the commands that source this file.
# shellcheck disable=SC2034
# Shared by the testbed's commands: where images live, what the host needs, how one outer
# machine is booted, and how a command is handed to it.
#
# The idea: every outer machine has a state directory. Its ctl/ is shared over 9p; a command is a
# directory ctl/jobs/NAME holding a script, its number goes down a virtio-serial port (so the
# guest never polls), and the guest writes `out` while it runs and `rc` when it has ended. 9p
# writes are synchronous, so nothing is lost when the machine is switched off afterwards.

TESTBED_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO_DIR=$(cd "$TESTBED_DIR/../.." && pwd)
HUSK_CACHE=${HUSK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/husk}
SUITES="trixie forky"

say() { printf 'testbed: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# check_suite NAME: only suites that we build an image for.
check_suite() {
    case " $SUITES " in
        *" $1 "*) ;;
        *) die "unknown suite '$1'; choose one of: $SUITES" ;;
    esac
}

# option_value OPTION REMAINING: an option that wants a value has one.
option_value() { (($2 >= 2)) || die "$1 wants a value"; }

# image_dir SUITE: the directory named by the hash of everything that shapes the image.
image_dir() {
    local hash
    hash=$(cd "$TESTBED_DIR" && sha256sum build-image image/* | sha256sum)
    printf '%s/testbed/%s-%s\n' "$HUSK_CACHE" "$1" "${hash:0:16}"
}

# apt ARGS: waits for another apt to end; its talk is shown when it fails.
apt() {
    local log
    log=$(mktemp)
    if ! DEBIAN_FRONTEND=noninteractive apt-get --quiet=2 -o DPkg::Lock::Timeout=600 "$@" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        die "apt-get $* failed; its output is above"
    fi
    rm -f "$log"
}

# apt_install PACKAGES: as root, without what they merely recommend.
apt_install() {
    [[ $(id -u) == 0 ]] || die "missing on this host: $*; run as root once, or install them"
    say "installing on this host: $*"
    apt install --yes --no-install-recommends "$@"
}

qemu_major() {
    local version
    version=$(qemu-system-x86_64 --version 2>/dev/null) || { echo 0; return; }
    [[ $version =~ version\ ([0-9]+)\. ]] && echo "${BASH_REMATCH[1]}" || echo 0
}

# need_qemu: QEMU >= 10. Debian 12's own 7.2 emulates SVM slowly and once crashed the outer
# kernel, so Debian 12 gets it from its backports.
need_qemu() {
    (($(qemu_major) >= 10)) && return
    [[ $(id -u) == 0 ]] || die "QEMU >= 10 is needed (qemu-system-x86); run as root once, or install it"
    local codename
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    if [[ $codename == bookworm ]]; then
        if ! grep -rqsE '^[^#]*bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d; then
            cat >/etc/apt/sources.list.d/husk-bookworm-backports.sources <<'SOURCES'
# Added by husk's tests/testbed for QEMU >= 10.
Types: deb
URIs: http://deb.debian.org/debian
Suites: bookworm-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
        fi
        apt update
        apt_install -t bookworm-backports qemu-system-x86 seabios ipxe-qemu
    else
        apt update
        apt_install qemu-system-x86
    fi
    (($(qemu_major) >= 10)) || die "this host's QEMU is older than 10 and apt has no newer one; install QEMU >= 10"
}

# forget_dead: the state of runs that were killed before they could clean up.
forget_dead() {
    local state
    for state in "${TMPDIR:-/tmp}"/husk-testbed.??????; do
        [[ -O $state && -n $(find "$state" -maxdepth 0 -mmin +60) ]] || continue
        machine_alive "$state" || rm -rf "$state"
    done
}

# new_state DIR: lay out an outer machine's state directory.
new_state() {
    mkdir -p "$1/ctl/jobs" "$1/out"
    mkfifo "$1"/{jobs,monitor}.{in,out}
}

# qemu_command STATE IMAGE PAYLOAD OUT MEM SMP [EXTRA…]: fills the array QEMU.
qemu_command() {
    local state=$1 image=$2 payload=$3 out=$4 mem=$5 smp=$6
    shift 6
    local accel=tcg,thread=multi cpu=max
    if [[ $("$TESTBED_DIR/detect-kvm" 2>/dev/null) == hardware ]] && nested_enabled; then
        accel=kvm cpu=host
    fi
    # shellcheck disable=SC2054
    QEMU=(qemu-system-x86_64
        -nodefaults -no-user-config -display none -no-reboot
        -name "husk-testbed"
        -bios qboot.rom -M "q35,usb=off,vmport=off" -accel "$accel" -cpu "$cpu" -smp "$smp" -m "${mem}M"
        -kernel "$image/vmlinux" -initrd "$image/initrd"
        -append "$(<"$image/cmdline")"
        -drive "if=none,id=root,file=$image/root.ext4,format=raw,snapshot=on,discard=unmap"
        -device virtio-blk-pci,drive=root
        -chardev "file,id=serial,path=$state/serial.log" -serial chardev:serial
        -chardev "pipe,id=monitor,path=$state/monitor" -mon chardev=monitor
        -device virtio-serial-pci
        -chardev "pipe,id=jobs,path=$state/jobs" -device virtserialport,chardev=jobs,name=jobs
        -fsdev "local,id=ctl,path=$state/ctl,security_model=none"
        -device virtio-9p-pci,fsdev=ctl,mount_tag=ctl
        -fsdev "local,id=out,path=$out,security_model=none,multidevs=remap"
        -device virtio-9p-pci,fsdev=out,mount_tag=out
        -fsdev "local,id=payload,path=$payload,security_model=none,readonly=on,multidevs=remap"
        -device virtio-9p-pci,fsdev=payload,mount_tag=payload
        "$@")
}

# machine_defaults: the settings that every command shares.
machine_defaults() {
    SUITE=trixie MEM=6144 SMP=${HUSK_TESTBED_SMP:-2} PAYLOAD=$REPO_DIR/target/testbed/payload OUT='' JOB_ENV=()
}

# machine_option OPTION VALUE: takes one of the shared options.
machine_option() {
    case $1 in
        --suite | --mem | --smp | --payload | --out | --env) option_value "$1" $# ;;
        *) say "unknown option '$1'"; exit 2 ;;
    esac
    case $1 in
        --suite) check_suite "$2"; SUITE=$2 ;;
        --mem) MEM=$2 ;;
        --smp) SMP=$2 ;;
        --payload) PAYLOAD=$2 ;;
        --out) OUT=$2 ;;
        --env)
            [[ $2 == [A-Za-z_]*=* ]] || die "--env wants KEY=VALUE, not '$2'"
            JOB_ENV+=("$2")
            ;;
    esac
}

# boot_machine STATE IMAGE OUT [EXTRA…]: starts QEMU as a child that dies with this shell; writes
# its pid to STATE/pid.
boot_machine() {
    local state=$1 image=$2 out=$3
    shift 3
    mkdir -p "$PAYLOAD" "$out"
    qemu_command "$state" "$image" "$PAYLOAD" "$out" "$MEM" "$SMP" "$@"
    # QEMU unlinks the snapshot as soon as it is open: a killed one leaves no file.
    TMPDIR=$state setpriv --pdeathsig KILL "${QEMU[@]}" </dev/null >"$state/qemu.log" 2>&1 &
    echo "$!" >"$state/pid"
}

# stop_machine STATE: nothing in there is worth a shutdown. `up` puts a machine into a process
# group of its own, `run` does not.
stop_machine() {
    local pid
    machine_alive "$1" || return 0
    pid=$(<"$1/pid")
    kill -KILL -- "-$pid" 2>/dev/null || kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

# named_state NAME: where `up` keeps a machine's state.
named_state() {
    [[ $1 =~ ^[A-Za-z0-9._-]+$ ]] || die "a machine's name has letters, digits, dots and dashes, not '$1'"
    printf '%s/husk-testbed-up-%s-%s\n' "${TMPDIR:-/tmp}" "$(id -u)" "$1"
}

# machine_names: the machines that `up` started, one a line.
machine_names() {
    local state prefix
    prefix=${TMPDIR:-/tmp}/husk-testbed-up-$(id -u)-
    for state in "$prefix"*; do
        [[ -d $state ]] && printf '%s\n' "${state#"$prefix"}"
    done
    return 0
}

# only_machine: the name of the one machine that is up.
only_machine() {
    local names
    mapfile -t names < <(machine_names)
    case ${#names[@]} in
        0) die "no machine is up; start one with tests/testbed/up" ;;
        1) printf '%s\n' "${names[0]}" ;;
        *) die "several machines are up (${names[*]}); say which with --name, or in HUSK_TESTBED" ;;
    esac
}

# kill_job STATE JOB: the command and what it started in its session.
kill_job() { echo "kill $2" >"$1/jobs.in"; }

# elapsed SINCE: seconds since an $EPOCHREALTIME, with one decimal.
elapsed() { awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }'; }

# nested_enabled: the host's KVM lets its guests be hosts.
nested_enabled() {
    local file
    for file in /sys/module/kvm_amd/parameters/nested /sys/module/kvm_intel/parameters/nested; do
        [[ -r $file && $(<"$file") == [1Y] ]] && return
    done
    return 1
}

# submit STATE ENV-ARRAY-NAME COMMAND…: hand a command to the machine; prints the job's name.
submit() {
    local state=$1 job pair
    local -n job_env=$2
    shift 2
    job=$(mktemp -d "$state/ctl/jobs/XXXXXX")
    {
        for pair in "${job_env[@]}"; do
            printf 'export %s=%q\n' "${pair%%=*}" "${pair#*=}"
        done
        # One argument is a shell command line, several are an argument vector, as with ssh.
        if (($# == 1)); then printf '%s\n' "$1"; else printf '%q ' exec "$@"; fi
    } >"$job/cmd"
    : >"$job/out"
    echo "run ${job##*/}" >"$state/jobs.in"
    echo "${job##*/}"
}

# machine_alive STATE
machine_alive() { [[ -s $1/pid ]] && kill -0 "$(<"$1/pid")" 2>/dev/null; }

# pause_for SECONDS: sleep without a process (fd 9 is a FIFO that nobody writes to).
pause_for() { read -rt "$1" -u 9 || true; }

# await_ready STATE: true once the machine takes jobs; false when it died or did not in 3 minutes.
await_ready() {
    local deadline=$((SECONDS + 180))
    exec 9<>"$1/jobs.out"
    until [[ -e $1/ctl/ready ]]; do
        machine_alive "$1" || return 1
        ((SECONDS < deadline)) || return 1
        pause_for 0.05
    done
}

# A machine that has not written to ctl/alive for so long, in seconds, has stalled; it does every few seconds.
STALLED=120
# One that has been silent for so long, in seconds, is poked, and again after as long. Its CPU has been seen halted with interrupts enabled and
# the timer's pending: QEMU has lost the wake-up. Any other device's interrupt makes its APIC look again.
SILENT=15

# follow STATE JOB DEADLINE: stream the job's output to stdout until it ends; sets JOB_STATUS to
# its exit code, or to `timeout`, `died` or `stalled`. DEADLINE is in SECONDS' terms.
follow() {
    local state=$1 dir=$1/ctl/jobs/$2 deadline=$3 waiter tailer silent=0
    exec 9<>"$state/jobs.out"
    (
        heard=$SECONDS last='' beat='' poked=$SECONDS
        until [[ -e $dir/rc ]]; do
            machine_alive "$state" || break
            ((SECONDS < deadline)) || break
            read -r beat <"$state/ctl/alive" || true
            [[ $beat == "$last" ]] || heard=$SECONDS last=$beat
            ((SECONDS - heard < STALLED)) || exit 1
            if ((SECONDS - heard >= SILENT && SECONDS - poked >= SILENT)); then
                say "silent for $((SECONDS - heard)) s: poked"
                poke "$state"
                poked=$SECONDS
            fi
            pause_for 0.05
        done
    ) &
    waiter=$!
    # With --pid, tail reads to the end once more after the waiter has gone, then leaves.
    tail -c +1 -f -s 0.05 --pid="$waiter" "$dir/out" &
    tailer=$!
    wait "$waiter" || silent=1
    wait "$tailer" || true
    if [[ -e $dir/rc ]]; then
        JOB_STATUS=$(<"$dir/rc")
    elif ((silent)); then
        JOB_STATUS=stalled
    elif machine_alive "$state"; then
        JOB_STATUS=timeout
    else
        JOB_STATUS=died
    fi
}

# poke STATE: an interrupt of the serial port that jobs come by, and a kick of the CPUs' threads.
poke() {
    echo poke >"$1/jobs.in"
    printf 'stop\ncont\n' >"$1/monitor.in"
}

# show_processors STATE: what a stalled machine's processors are at. Two looks tell whether they move.
show_processors() {
    local look line
    exec 8<>"$1/monitor.out"
    say "--- its processors, as QEMU has them ---"
    for look in "info registers -a" "info lapic" "info registers -a"; do
        echo "$look" >"$1/monitor.in"
        while read -rt 2 -u 8 line; do
            if [[ $line =~ ^(CPU#|R[A-Z0-9]+ *=|[CE]S =|CR|EFER|dumping|LVT|Timer|SPIV|I[SR]R|PPR) ]]; then
                printf '%s\n' "${line%$'\r'}" >&2
            fi
        done
    done
}

# show_console STATE LINES: the outer machine's own last words.
show_console() {
    say "--- last lines of the outer machine's console ---"
    cat "$1/qemu.log" >&2 2>/dev/null || true
    tail -n "$2" "$1/serial.log" 2>/dev/null | tr -d '\r' >&2 || true
    say "--- end of console ---"
}
