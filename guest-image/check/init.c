/*
 * /init of the kernel check: tries, as an ordinary program would, what husk needs of its guest kernel,
 * prints one line a check and powers off. Trying beats reading the configuration: an option can be
 * set and its feature still not work.
 *
 * Runs as PID 1 of a throw-away VM; a check may leave mounts, cgroups and interfaces behind.
 */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/bpf.h>
#include <linux/landlock.h>
#include <linux/perf_event.h>
#include <linux/seccomp.h>
#include <linux/filter.h>
#include <linux/userfaultfd.h>
#include <mqueue.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif

static int checks, failures;

bool check(const char *name, bool passed)
{
    checks++;
    if (passed) {
        printf("ok   %s\n", name);
    } else {
        failures++;
        printf("FAIL %s: %s\n", name, strerror(errno));
    }
    return passed;
}

/* The start of a small file, NUL-terminated; "" when it cannot be read. */
static const char *contents(const char *path)
{
    static char text[16384];
    ssize_t length = -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd >= 0) {
        length = read(fd, text, sizeof text - 1);
        close(fd);
    }
    text[length > 0 ? length : 0] = 0;
    return text;
}

static bool write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool written = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

    if (fd >= 0)
        close(fd);
    return written;
}

/* Whether `word` stands in the file between white space or brackets. */
static bool lists(const char *path, const char *word)
{
    const char *text = contents(path), *found = text;
    size_t length = strlen(word);

    while ((found = strstr(found, word))) {
        if ((found == text || strchr(" \t\n[", found[-1])) && strchr(" \t\n]", found[length]))
            return true;
        found += length;
    }
    errno = ENOENT;
    return false;
}

/* Runs `body` in a child; true when it exits with 0. Its errno travels in the exit code. */
static bool in_child(bool (*body)(void))
{
    int status = 0;
    pid_t child = fork();

    if (child == 0)
        _exit(body() ? 0 : errno ? errno : EINVAL);
    if (child < 0 || waitpid(child, &status, 0) != child)
        return false;
    errno = WIFEXITED(status) ? WEXITSTATUS(status) : EINTR;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* ---- file systems ---------------------------------------------------------------------------- */

static bool mounted(const char *type, const char *where, const char *options)
{
    mkdir(where, 0755);
    return mount(type, where, type, 0, options) == 0;
}

static bool overlay(void)
{
    const char *directories[] = {"/tmp/lower", "/tmp/upper", "/tmp/work"};

    for (size_t i = 0; i < 3; i++)
        mkdir(directories[i], 0755);
    return mounted("overlay", "/tmp/merged", "lowerdir=/tmp/lower,upperdir=/tmp/upper,workdir=/tmp/work") &&
           close(creat("/tmp/merged/file", 0644)) == 0 && access("/tmp/upper/file", F_OK) == 0;
}

/* An ACL with one named user, in the kernel's wire format: version 2, then (tag, permissions, id). */
static bool posix_acl(void)
{
    const unsigned char acl[] = {
        2, 0, 0, 0,
        0x01, 0, 6, 0, 0xff, 0xff, 0xff, 0xff, /* owner */
        0x02, 0, 4, 0, 0xe8, 0x03, 0, 0,       /* user 1000 */
        0x04, 0, 4, 0, 0xff, 0xff, 0xff, 0xff, /* group */
        0x10, 0, 4, 0, 0xff, 0xff, 0xff, 0xff, /* mask */
        0x20, 0, 4, 0, 0xff, 0xff, 0xff, 0xff, /* others */
    };
    close(creat("/tmp/acl", 0644));
    return setxattr("/tmp/acl", "system.posix_acl_access", acl, sizeof acl, 0) == 0;
}

static bool xattr(void)
{
    close(creat("/tmp/xattr", 0644));
    return setxattr("/tmp/xattr", "trusted.husk", "1", 1, 0) == 0 &&
           setxattr("/tmp/xattr", "user.husk", "1", 1, 0) == 0;
}

static void check_file_systems(void)
{
    static const char *const types[] = {"fuse", "virtiofs", "ext4", "erofs", "binfmt_misc"};

    check("proc", mounted("proc", "/proc", NULL));
    check("sysfs", mounted("sysfs", "/sys", NULL));
    check("devtmpfs", mounted("devtmpfs", "/dev", NULL));
    check("devpts", mounted("devpts", "/dev/pts", "newinstance,ptmxmode=0666") &&
                        access("/dev/pts/ptmx", F_OK) == 0);
    check("mqueue", mounted("mqueue", "/dev/mqueue", NULL));
    check("hugetlbfs", mounted("hugetlbfs", "/dev/hugepages", "pagesize=2M"));
    check("tmpfs", mounted("tmpfs", "/tmp", "size=16m,mode=1777"));
    check("tmpfs xattr", xattr());
    check("tmpfs acl", posix_acl());
    check("overlay", overlay());
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        char name[64];

        snprintf(name, sizeof name, "%s registered", types[i]);
        check(name, lists("/proc/filesystems", types[i]));
    }
    check("loop control", access("/dev/loop-control", F_OK) == 0);
    check("fuse device", access("/dev/fuse", F_OK) == 0);
    check("/proc/config.gz", access("/proc/config.gz", R_OK) == 0);
}

/* ---- cgroups --------------------------------------------------------------------------------- */

/* Allows no device at all: "return 0". */
static int device_program(void)
{
    const struct bpf_insn program[] = {
        {.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 0},
        {.code = BPF_JMP | BPF_EXIT},
    };
    union bpf_attr load = {
        .prog_type = BPF_PROG_TYPE_CGROUP_DEVICE,
        .insns = (unsigned long)program,
        .insn_cnt = 2,
        .license = (unsigned long)"Apache-2.0",
    };
    return (int)syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof load);
}

static bool device_rules(void)
{
    int group = open("/sys/fs/cgroup/test", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int program = device_program();
    union bpf_attr attach = {
        .target_fd = (unsigned)group,
        .attach_bpf_fd = (unsigned)program,
        .attach_type = BPF_CGROUP_DEVICE,
        .attach_flags = BPF_F_ALLOW_MULTI,
    };
    if (group < 0 || program < 0 || syscall(SYS_bpf, BPF_PROG_ATTACH, &attach, sizeof attach) != 0)
        return false;
    if (!write_file("/sys/fs/cgroup/test/cgroup.procs", "0"))
        return false;
    return open("/dev/null", O_RDONLY) < 0 && errno == EPERM;
}

static void check_cgroups(void)
{
    static const char *const controllers[] = {"cpuset", "cpu", "io", "memory", "hugetlb", "pids", "misc"};
    static const char *const files[] = {
        "cgroup.freeze", "cgroup.kill",    "cpu.max",  "cpu.weight",   "cpuset.cpus", "io.max",  "io.weight",
        "memory.max",    "memory.swap.max", "pids.max", "hugetlb.2MB.max", "cpu.pressure", "memory.pressure",
    };
    char text[128];

    check("cgroup2", mounted("cgroup2", "/sys/fs/cgroup", NULL));
    mkdir("/sys/fs/cgroup/test", 0755);
    for (size_t i = 0; i < sizeof controllers / sizeof *controllers; i++) {
        snprintf(text, sizeof text, "+%s", controllers[i]);
        bool enabled = write_file("/sys/fs/cgroup/cgroup.subtree_control", text);
        snprintf(text, sizeof text, "cgroup controller %s", controllers[i]);
        check(text, enabled);
    }
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        snprintf(text, sizeof text, "/sys/fs/cgroup/test/%s", files[i]);
        bool there = access(text, F_OK) == 0;
        snprintf(text, sizeof text, "cgroup file %s", files[i]);
        check(text, there);
    }
    check("cgroup device rules (BPF)", in_child(device_rules));
    check("BPF JIT", lists("/proc/sys/net/core/bpf_jit_enable", "1"));
}

/* ---- namespaces ------------------------------------------------------------------------------ */

static int wanted_namespace;

static bool unshared(void)
{
    return unshare(wanted_namespace) == 0;
}

static void check_namespaces(void)
{
    static const struct {
        const char *name;
        int flag;
    } namespaces[] = {
        {"cgroup", CLONE_NEWCGROUP}, {"ipc", CLONE_NEWIPC},   {"mnt", CLONE_NEWNS},   {"net", CLONE_NEWNET},
        {"pid", CLONE_NEWPID},       {"time", CLONE_NEWTIME}, {"user", CLONE_NEWUSER}, {"uts", CLONE_NEWUTS},
    };
    char text[64];

    for (size_t i = 0; i < sizeof namespaces / sizeof *namespaces; i++) {
        snprintf(text, sizeof text, "/proc/self/ns/%s", namespaces[i].name);
        bool there = access(text, F_OK) == 0;
        wanted_namespace = namespaces[i].flag;
        snprintf(text, sizeof text, "namespace %s", namespaces[i].name);
        check(text, there && in_child(unshared));
    }
}

/* ---- security -------------------------------------------------------------------------------- */

/* A filter that turns getppid into ENOSYS: no other reason makes that call fail. */
static bool seccomp_filter(void)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = 4, .filter = filter};

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) != 0)
        return false;
    return syscall(SYS_getppid) == -1 && errno == ENOSYS;
}

static bool ptrace_stop(void)
{
    int status;
    pid_t child = fork();

    if (child == 0) {
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        raise(SIGSTOP);
        _exit(7);
    }
    return waitpid(child, &status, 0) == child && WIFSTOPPED(status) &&
           ptrace(PTRACE_SYSCALL, child, NULL, NULL) == 0 && waitpid(child, &status, 0) == child &&
           WIFSTOPPED(status) && ptrace(PTRACE_CONT, child, NULL, NULL) == 0 &&
           waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 7;
}

static bool core_dump(void)
{
    struct rlimit unlimited = {RLIM_INFINITY, RLIM_INFINITY};
    char magic[4] = "";
    int status;
    pid_t child;

    write_file("/proc/sys/kernel/core_pattern", "/tmp/core");
    child = fork();
    if (child == 0) {
        setrlimit(RLIMIT_CORE, &unlimited);
        abort();
    }
    if (waitpid(child, &status, 0) != child || !WCOREDUMP(status))
        return false;
    return read(open("/tmp/core", O_RDONLY), magic, 4) == 4 && memcmp(magic, "\177ELF", 4) == 0;
}

/* getpid by the 32-bit entry: -ENOSYS, or a fault, without IA32 emulation. */
static bool ia32_call(void)
{
    long result;

    __asm__ volatile("int $0x80" : "=a"(result) : "a"(20L) : "memory", "r8", "r9", "r10", "r11");
    return result == getpid();
}

static void check_security(void)
{
    unsigned action = SECCOMP_RET_USER_NOTIF;

    check("seccomp filter", in_child(seccomp_filter));
    check("seccomp user notification", syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action) == 0);
    check("landlock", syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION) >= 1);
    check("keyrings", syscall(SYS_add_key, "user", "husk", "x", 1, -2 /* process keyring */) >= 0);
    check("ptrace", ptrace_stop());
    check("core dump", core_dump());
    check("32-bit system calls", in_child(ia32_call));
}

/* ---- system calls ---------------------------------------------------------------------------- */

static bool cross_memory(void)
{
    char from = 'x', to = 0;
    struct iovec local = {&to, 1}, remote = {&from, 1};

    return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == 1 && to == 'x';
}

static bool signal_fd(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    return signalfd(-1, &set, SFD_CLOEXEC) >= 0;
}

static bool perf_clock(void)
{
    struct perf_event_attr attributes = {
        .type = PERF_TYPE_SOFTWARE,
        .size = sizeof attributes,
        .config = PERF_COUNT_SW_TASK_CLOCK,
    };
    return syscall(SYS_perf_event_open, &attributes, 0, -1, -1, 0) >= 0;
}

static bool file_handle(void)
{
    struct {
        struct file_handle head;
        char space[128];
    } handle = {.head.handle_bytes = 128};
    int mount_id;

    return name_to_handle_at(AT_FDCWD, "/tmp", &handle.head, &mount_id, 0) == 0;
}

static void check_system_calls(void)
{
    char parameters[256] = "";
    unsigned long context = 0;

    check("epoll", epoll_create1(EPOLL_CLOEXEC) >= 0);
    check("eventfd", eventfd(0, EFD_CLOEXEC) >= 0);
    check("timerfd", timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC) >= 0);
    check("signalfd", signal_fd());
    check("inotify", inotify_init1(IN_CLOEXEC) >= 0);
    check("fanotify", fanotify_init(FAN_CLASS_NOTIF, O_RDONLY) >= 0);
    check("aio", syscall(SYS_io_setup, 8, &context) == 0);
    check("io_uring", syscall(SYS_io_uring_setup, 8, parameters) >= 0);
    check("userfaultfd", syscall(SYS_userfaultfd, O_CLOEXEC) >= 0);
    check("memfd", memfd_create("husk", MFD_CLOEXEC) >= 0);
    check("memfd_secret", syscall(447 /* memfd_secret */, 0) >= 0);
    check("pidfd", syscall(SYS_pidfd_open, getpid(), 0) >= 0);
    check("kcmp", syscall(SYS_kcmp, getpid(), getpid(), 1 /* KCMP_VM */, 0, 0) == 0);
    check("process_vm_readv", cross_memory());
    check("name_to_handle_at", file_handle());
    check("perf software event", perf_clock());
    check("SysV shared memory", shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600) >= 0);
    check("POSIX message queue", mq_open("/husk", O_CREAT | O_RDWR, 0600, NULL) >= 0);
    check("membarrier", syscall(SYS_membarrier, 0, 0, 0) > 0);
}

/* ---- machine --------------------------------------------------------------------------------- */

/* Feature bit 5 of a virtio balloon: free-page reporting, as negotiated. */
static bool page_reporting(void)
{
    char path[64];

    for (int i = 0; i < 32; i++) {
        snprintf(path, sizeof path, "/sys/bus/virtio/devices/virtio%d/device", i);
        if (strncmp(contents(path), "0x0005", 6) != 0)
            continue;
        snprintf(path, sizeof path, "/sys/bus/virtio/devices/virtio%d/features", i);
        return contents(path)[5] == '1';
    }
    errno = ENODEV;
    return false;
}

static void check_machine(void)
{
    static const char *const drivers[] = {
        "virtio_balloon", "virtio_blk", "virtio_mem", "virtio_net", "virtio_rng", "virtiofs",
        "vmw_vsock_virtio_transport",
    };
    struct timespec resolution;
    unsigned char random[16];
    char text[96];

    check("two vCPUs", sysconf(_SC_NPROCESSORS_ONLN) == 2);
    check("room for 32 vCPUs", lists("/sys/devices/system/cpu/kernel_max", "31"));
    for (size_t i = 0; i < sizeof drivers / sizeof *drivers; i++) {
        snprintf(text, sizeof text, "/sys/bus/virtio/drivers/%s", drivers[i]);
        bool there = access(text, F_OK) == 0;
        snprintf(text, sizeof text, "driver %s", drivers[i]);
        check(text, there);
    }
    check("VMGenID driver", access("/sys/bus/acpi/drivers/vmgenid", F_OK) == 0 ||
                                access("/sys/bus/platform/drivers/vmgenid", F_OK) == 0);
    check("virtio-blk device", access("/dev/vda", F_OK) == 0);
    check("free-page reporting", page_reporting());
    check("hardware random numbers", read(open("/dev/hwrng", O_RDONLY), random, sizeof random) > 0);
    check("transparent huge pages on request", strstr(contents("/sys/kernel/mm/transparent_hugepage/enabled"), "[madvise]"));
    check("hot-plugged memory goes online", lists("/sys/devices/system/memory/auto_online_blocks", "online"));
    check("swap", access("/proc/swaps", F_OK) == 0);
    check("pressure stall information", strstr(contents("/proc/pressure/memory"), "some"));
    check("high-resolution timers", clock_getres(CLOCK_MONOTONIC, &resolution) == 0 && resolution.tv_nsec == 1);
}

int main(void)
{
    struct timespec now;

    /* The kernel's clock starts early in its boot, so this is the time it took, in the guest's view. */
    clock_gettime(CLOCK_MONOTONIC, &now);
    setvbuf(stdout, NULL, _IOLBF, 0);
    check_file_systems();
    check_cgroups();
    check_namespaces();
    check_security();
    check_system_calls();
    check_network();
    check_machine();
    printf("init after %ld.%03ld s\n", (long)now.tv_sec, now.tv_nsec / 1000000);
    printf("husk-check: %d checks, %d failed\n", checks, failures);
    fflush(stdout);
    reboot(lists("/proc/cmdline", "husk.end=reboot") ? RB_AUTOBOOT : RB_POWER_OFF);
    return 1;
}
