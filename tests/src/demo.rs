//! `make run`: one container in its own microVM, and where the time of its start went; then one by `husk run`, of an image pulled from a
//! registry that is started here.

use std::{
    env, fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail};
use husk_tests::{
    containerd::{BUSYBOX, Containerd},
    ctr,
    runtime::Runtime,
    timing, wait,
};

const SCRIPT: &str = "echo \"Hello from a container. My kernel is $(uname -r), \
    I see $(grep -c ^processor /proc/cpuinfo) CPU and $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) MiB of memory.\"; \
    echo 'The processes I can see:'; ps -o pid,comm";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk-demo: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let (image, registry) = arguments()?;
    let bin = env::current_exe()?
        .parent()
        .map(Path::to_owned)
        .context("husk-demo has no directory")?;
    // Its own root, state and socket: a containerd that is already here is none of our business.
    let containerd = Containerd::start(Path::new("/run/husk-demo"), &bin)?;
    containerd.import(&image)?;

    println!("\n$ ctr run --rm --runtime io.containerd.husk.v2 {BUSYBOX} demo sh -c '…'\n");
    let mut command =
        containerd.run_command(Runtime::Husk, "demo", &["--rm"], &["sh", "-c", SCRIPT]);
    let out = ctr::output(&mut command)?;
    print!("{}", String::from_utf8_lossy(&out.stdout));
    eprint!("{}", String::from_utf8_lossy(&out.stderr));
    if out.code != 0 {
        bail!(
            "the container ended with exit code {}; the end of containerd's log:\n{}",
            out.code,
            containerd.log_tail(40)
        );
    }
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")
        .context("reading the host's kernel release")?;
    println!("\nThe host's kernel is {}.", host.trim());

    let phases = wait::until("the shim's timing lines", || {
        let found = timing::phases(&containerd.log(), "demo");
        found.contains_key("exit_to_reaped").then_some(found)
    })?;
    println!("\nWhere the start's time went:");
    let mut total = 0.0;
    for (name, covers) in timing::PHASES {
        if let Some(ms) = phases.get(name) {
            total += ms;
            println!("  {name:<17} {ms:>9.1} ms   {covers}");
        }
    }
    println!("  {:<17} {total:>9.1} ms\n", "total");
    without_a_daemon(&bin, &registry)
}

/// `husk run` of an image that no containerd has anything to do with.
fn without_a_daemon(bin: &Path, dir: &Path) -> Result<()> {
    let registry = Registry::start(dir)?;
    let image = format!("{}/busybox:1", registry.host);
    println!(
        "$ husk run --rm --network none {image} sh -c '…'   # pulled from a registry on this machine, without any daemon\n"
    );
    let root = tempfile::tempdir_in("/run")?;
    let status = Command::new(bin.join("husk"))
        .arg("--root")
        .arg(root.path())
        .args([
            "run",
            "--rm",
            "--network",
            "none",
            &image,
            "sh",
            "-c",
            SCRIPT,
        ])
        .status()
        .context("starting husk")?;
    if !status.success() {
        bail!("husk run has failed: {status}");
    }
    println!();
    Ok(())
}

/// A registry with busybox in it. Dropped, it ends.
struct Registry {
    host: String,
    server: Child,
}

impl Registry {
    /// `dir` is as tests/scripts/demo-registry lays it out.
    fn start(dir: &Path) -> Result<Self> {
        let host = {
            let free = TcpListener::bind("127.0.0.1:0")?;
            free.local_addr()?.to_string()
        };
        let config = tempfile::NamedTempFile::new()?;
        let text = format!(
            "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n",
            dir.join("data").display()
        );
        fs::write(config.path(), text)?;
        let server = Command::new(dir.join("docker-registry"))
            .arg("serve")
            .arg(config.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting the registry")?;
        let registry = Self { host, server };
        wait::until("the registry to answer", || {
            TcpStream::connect(&registry.host).ok().map(drop)
        })?;
        Ok(registry)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It is not asked for anything any more.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// The image for containerd, and the registry's directory.
fn arguments() -> Result<(PathBuf, PathBuf)> {
    match env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [flag, image, other, registry] if flag == "--image" && other == "--registry" => {
            Ok((PathBuf::from(image), PathBuf::from(registry)))
        }
        _ => bail!(
            "usage: husk-demo --image ARCHIVE --registry DIR (an OCI image archive that holds {BUSYBOX}, and what tests/scripts/demo-registry has made)"
        ),
    }
}
