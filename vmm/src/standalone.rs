//! `husk-vmm run`: a VM from files, without a shim, for debugging and benches.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use husk_protocol::vm::{CachePolicy, NicConfig, VmExit};
use husk_protocol::{guest_path, vm::MAX_VCPUS, vm::MIN_MEMORY_MIB};
use husk_vmm::clock;
use husk_vmm::jail::{privileges, root::Root};
use husk_vmm::parts::{Parts, Share};
use husk_vmm::virtio::net::open_tap;
use husk_vmm::vm::Vm;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// What `husk-vmm run` takes.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Uncompressed ELF vmlinux with a PVH entry point
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initramfs whose /init the guest runs
    #[arg(long, value_name = "FILE")]
    initramfs: PathBuf,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256,
          value_parser = clap::value_parser!(u64).range(MIN_MEMORY_MIB..))]
    memory: u64,
    /// vCPUs
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_VCPUS)))]
    cpus: u8,
    /// Share this directory with the guest as virtio-fs tag "husk"
    #[arg(long, value_name = "DIR")]
    share: Option<PathBuf>,
    /// Connect the guest to the tap of this name; one is made if there is none
    #[arg(long, value_name = "NAME")]
    tap: Option<String>,
    /// Log the guest's whole boot; its console goes to standard output either way
    #[arg(long)]
    console: bool,
    /// Kernel parameters to append
    #[arg(long, value_name = "PARAMS", default_value = "")]
    params: String,
}

/// Runs a VM to its end. Success is a guest that powered itself off.
pub fn run(options: Options, started: u64) -> anyhow::Result<ExitCode> {
    let open = |path: &PathBuf| {
        File::open(path).with_context(|| format!("cannot open {}", path.display()))
    };
    let kvm = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("cannot open /dev/kvm: is the KVM module loaded, and may this user use it?")?;
    let shares = match &options.share {
        None => Vec::new(),
        Some(path) => vec![Share {
            tag: guest_path::SHARE_TAG.into(),
            root: Root::outside(directory(path)?).context("cannot open /proc/self/fd")?,
            cache: CachePolicy::Auto,
        }],
    };
    let tap = options
        .tap
        .map(|name| open_tap(&name, 1).with_context(|| format!("cannot open the tap {name}")))
        .transpose()?;
    // Nobody sits at the other end of the bridge: a guest that dials is not answered.
    let (bridge, _silence) = UnixDatagram::pair().context("cannot make a socket pair")?;
    let parts = Parts {
        id: "standalone".into(),
        vcpus: options.cpus,
        max_vcpus: options.cpus,
        memory_mib: options.memory,
        max_memory_mib: options.memory,
        kvm: kvm.into(),
        kernel: open(&options.kernel)?,
        initramfs: open(&options.initramfs)?,
        kernel_params: options.params,
        vsock: bridge.into(),
        shares,
        nics: tap.iter().map(|_| NicConfig { queue_pairs: 1 }).collect(),
        console: Some(
            io::stdout()
                .as_fd()
                .try_clone_to_owned()
                .context("cannot use standard output")?,
        ),
        debug_console: options.console,
    };
    privileges::raise_descriptor_limit()?;
    let vhost = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/vhost-net");
    let mut vm = Vm::launch(parts, started)?;
    if let Some(tap) = tap {
        // Not every host has it, and the VM works without.
        let vhosts = vhost.into_iter().map(OwnedFd::from).collect();
        vm.attach_nic(0, tap, vhosts)?;
    }
    let times = vm.launch_times();
    let ended = wait(&vm);
    let stopped = clock::monotonic();
    let info = vm.info()?;
    vm.stop();
    vm.drain_console();
    ended?;

    let ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e6;
    eprintln!(
        "built in {:.1} ms, entered the guest after {:.1} ms, ran for {:.1} ms; {} of {} MiB of guest memory touched",
        ms(started, times.vm_built),
        ms(started, times.vcpus_running),
        ms(times.vcpus_running, stopped),
        info.resident_bytes >> 20,
        info.memory_bytes >> 20,
    );
    Ok(report(&vm.exit()))
}

fn directory(path: &PathBuf) -> anyhow::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_DIRECTORY)
        .open(path)
        .with_context(|| format!("cannot share {}", path.display()))?;
    Ok(file.into())
}

fn wait(vm: &Vm) -> anyhow::Result<()> {
    let mut fds = [PollFd::new(vm.ended(), PollFlags::POLLIN)];
    while let Err(error) = poll(&mut fds, PollTimeout::NONE) {
        if error != nix::errno::Errno::EINTR {
            return Err(error).context("cannot wait for the VM");
        }
    }
    Ok(())
}

fn report(exit: &VmExit) -> ExitCode {
    let console = match exit {
        VmExit::PowerOff => {
            eprintln!("the guest powered itself off");
            return ExitCode::SUCCESS;
        }
        VmExit::GuestPanic { console } => {
            eprintln!("the guest kernel panicked; its last console lines:");
            console.as_slice()
        }
        VmExit::KvmError { detail, console } => {
            eprintln!("KVM could not go on: {detail}; the last console lines:");
            console.as_slice()
        }
        VmExit::Stopped => {
            eprintln!("the VM was stopped");
            &[]
        }
        VmExit::Failed { detail } => {
            eprintln!("the VMM failed: {detail}");
            &[]
        }
    };
    for line in console {
        eprintln!("  | {line}");
    }
    ExitCode::FAILURE
}
