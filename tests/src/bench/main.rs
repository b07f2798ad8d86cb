//! `make bench`: husk beside runc, crun and runsc, in one run on one machine.
//!
//! Prints tables and writes `bench.json` into the directory given. The runtimes take turns, sample by sample, so that a slow
//! moment of the machine falls on all of them; figures are medians.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use husk_tests::{
    containerd::Containerd,
    ctr,
    runtime::{RUNSC, RUNSC_SCRIPT, Runtime},
    timing,
};

mod engines;
mod files;
mod memory;
mod pods;
mod table;

use table::{Row, Table};

/// Samples of each figure.
const SAMPLES: usize = 10;

const RUNTIMES: [Runtime; 4] = [Runtime::Husk, Runtime::Runc, Runtime::Crun, Runtime::Runsc];

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        // Runs inside the containers.
        ["file-workload", dir] => files::workload(Path::new(dir)),
        ["--out", dir, parts @ ..] => run(Path::new(dir), parts),
        _ => Err(anyhow::anyhow!(
            "usage: husk-bench --out DIR [PART…], all parts or some of: {}",
            PARTS.map(|(name, _)| name).join(", ")
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk-bench: {error:?}");
            ExitCode::FAILURE
        }
    }
}

/// What every measurement needs.
struct Bench {
    containerd: Containerd,
    /// Those that can run a container here.
    runtimes: Vec<Runtime>,
    bin: PathBuf,
}

type Measure = fn(&Bench, &mut Table) -> Result<()>;

/// What is measured, in this order.
const PARTS: [(&str, Measure); 6] = [
    ("start", start),
    ("engines", engines::measure),
    ("memory", memory::idle_pod),
    ("sizes", sizes),
    ("files", files::measure),
    ("pods", pods::measure),
];

fn run(out: &Path, only: &[&str]) -> Result<()> {
    let bin = env::current_exe()?
        .parent()
        .map(Path::to_owned)
        .context("husk-bench has no directory")?;
    let containerd = Containerd::start(Path::new("/run/husk-bench"), &bin)?;
    containerd.import(Path::new("/srv/images/busybox.tar"))?;
    fs::write(RUNSC, RUNSC_SCRIPT)?;
    fs::set_permissions(RUNSC, fs::Permissions::from_mode(0o755))?;
    let mut bench = Bench {
        containerd,
        runtimes: Vec::new(),
        bin,
    };
    for runtime in RUNTIMES {
        match run_once(&bench, runtime) {
            // The first run also warms what the later ones share.
            Ok(_) => bench.runtimes.push(runtime),
            Err(error) if runtime == Runtime::Husk => return Err(error),
            Err(error) => eprintln!("left out {runtime}: {error:#}"),
        }
    }
    let mut table = Table::default();
    for (name, measure) in PARTS {
        if only.is_empty() || only.contains(&name) {
            eprintln!("measuring {name}, {SAMPLES} samples of each runtime");
            measure(&bench, &mut table)?;
        }
    }
    table.print();
    let path = out.join("bench.json");
    fs::write(&path, table.json()?).with_context(|| format!("writing {}", path.display()))
}

/// Milliseconds of one `ctr run --rm` of `true`, and the container's id.
fn run_once(bench: &Bench, runtime: Runtime) -> Result<(f64, String)> {
    let id = bench.containerd.fresh_id("bench");
    let mut command = bench
        .containerd
        .run_command(runtime, &id, &["--rm"], &["true"]);
    let begin = Instant::now();
    let out = ctr::output(&mut command)?;
    let ms = begin.elapsed().as_secs_f64() * 1000.0;
    if out.code != 0 {
        bail!(
            "`ctr run` with {runtime} exited {}: {}",
            out.code,
            out.errors()
        );
    }
    Ok((ms, id))
}

fn start(bench: &Bench, table: &mut Table) -> Result<()> {
    let mut row = Row::new("ctr_run_rm", "ms");
    let mut ids = Vec::new();
    for _ in 0..SAMPLES {
        for &runtime in &bench.runtimes {
            let (ms, id) = run_once(bench, runtime)?;
            row.add(runtime, ms);
            if runtime == Runtime::Husk {
                ids.push(id);
            }
        }
    }
    table.push(row);
    let log = bench.containerd.log();
    for (phase, _) in timing::PHASES {
        let mut row = Row::new(format!("start_phases.{phase}"), "ms");
        for id in &ids {
            if let Some(ms) = timing::phases(&log, id).get(phase) {
                row.add(Runtime::Husk, *ms);
            }
        }
        table.push(row);
    }
    Ok(())
}

fn sizes(bench: &Bench, table: &mut Table) -> Result<()> {
    let lib = bench.bin.join("../lib/husk");
    let shim = bench.bin.join("containerd-shim-husk-v2");
    for (name, path) in [
        ("agent_bytes", lib.join("husk-agent")),
        ("initramfs_bytes", lib.join("initramfs.cpio")),
        ("kernel_bytes", lib.join("vmlinux")),
        ("vmm_bytes", lib.join("husk-vmm")),
        ("shim_bytes", shim),
    ] {
        let bytes = fs::metadata(&path)
            .with_context(|| format!("looking at {}", path.display()))?
            .len();
        let mut row = Row::new(name, "bytes");
        // A size is far below 2^52: nothing is lost.
        #[allow(clippy::cast_precision_loss, reason = "file sizes fit")]
        row.add(Runtime::Husk, bytes as f64);
        table.push(row);
    }
    Ok(())
}
