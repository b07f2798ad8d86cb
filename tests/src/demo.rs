//! `make run`: one container in its own microVM, and where the time of its start went.

use std::{env, fs, path::Path, path::PathBuf, process::ExitCode};

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
    let image = image()?;
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
    Ok(())
}

fn image() -> Result<PathBuf> {
    match env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [flag, path] if flag == "--image" => Ok(PathBuf::from(path)),
        _ => bail!("usage: husk-demo --image ARCHIVE (an OCI image archive that holds {BUSYBOX})"),
    }
}
