//! Files through virtio-fs, beside the same work on the host's file system (which is what runc gives).
//!
//! The workload is this binary again, run inside a container of a glibc root file system on a bound host directory.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::FileExt,
    path::Path,
    time::Instant,
};

use anyhow::{Context, Result};
use husk_tests::{ctr, runtime::Runtime};
use serde_json::Value;

use crate::{Bench, Row, SAMPLES, Table};

/// Bytes of the file that is read and written.
const FILE: usize = 32 << 20;
/// Accesses of each random and each metadata measurement.
const ACCESSES: usize = 1000;
const BLOCK: usize = 4096;

/// Name and unit of each figure, in the order in which the workload takes them.
const FIGURES: [(&str, &str); 6] = [
    ("fs_seq_write", "MiB/s"),
    ("fs_seq_read", "MiB/s"),
    ("fs_rand_read_4k", "op/s"),
    ("fs_rand_write_4k", "op/s"),
    ("fs_stat", "op/s"),
    ("fs_create_unlink", "op/s"),
];

/// Runs the workload in containers of each runtime.
pub fn measure(bench: &Bench, table: &mut Table) -> Result<()> {
    let work = bench.containerd.dir().join("files");
    fs::create_dir_all(&work)?;
    // Not through the testbed's 9p: the program itself should come from a plain file system.
    fs::copy(bench.bin.join("husk-bench"), work.join("husk-bench"))?;
    let mut rows: Vec<Row> = FIGURES
        .iter()
        .map(|(name, unit)| Row::new(*name, unit))
        .collect();
    for _ in 0..SAMPLES {
        for &runtime in bench.runtimes.iter().filter(|r| **r != Runtime::Crun) {
            let id = bench.containerd.fresh_id("files");
            let mount = format!("type=bind,src={},dst=/mnt,options=rbind:rw", work.display());
            let mut command = bench.containerd.ctr();
            command
                .arg("run")
                .args(runtime.ctr_flags())
                .args([
                    "--rm",
                    "--mount",
                    &mount,
                    "--rootfs",
                    "/srv/debian-rootfs",
                    &id,
                ])
                .args(["/mnt/husk-bench", "file-workload", "/mnt"]);
            let out = ctr::output(&mut command)?.ok()?;
            let figures: Value =
                serde_json::from_slice(&out.stdout).context("reading the workload's figures")?;
            for (row, (name, _)) in rows.iter_mut().zip(FIGURES) {
                row.add(
                    runtime,
                    figures[name]
                        .as_f64()
                        .with_context(|| format!("no {name} among {figures}"))?,
                );
            }
        }
    }
    rows.into_iter().for_each(|row| table.push(row));
    Ok(())
}

/// The work itself: prints one JSON object of figures.
pub fn workload(dir: &Path) -> Result<()> {
    let path = dir.join("data");
    let block = vec![0x5a; 1 << 20];
    let mib = |bytes: usize| f64::from(u32::try_from(bytes >> 20).unwrap_or(u32::MAX));
    let many = f64::from(u32::try_from(ACCESSES).unwrap_or(u32::MAX));

    let write = rate(mib(FILE), || {
        let mut file = File::create(&path)?;
        for _ in 0..FILE / block.len() {
            file.write_all(&block)?;
        }
        file.sync_all()
    })?;
    let read = rate(mib(FILE), || {
        let mut file = uncached(&path)?;
        let mut buffer = vec![0; 1 << 20];
        while file.read(&mut buffer)? > 0 {}
        Ok(())
    })?;
    let random_read = rate(many, || {
        let file = uncached(&path)?;
        let mut buffer = [0; BLOCK];
        offsets().try_for_each(|at| file.read_exact_at(&mut buffer, at))
    })?;
    let random_write = rate(many, || {
        let file = OpenOptions::new().write(true).open(&path)?;
        offsets().try_for_each(|at| file.write_all_at(&[0xa5; BLOCK], at))?;
        file.sync_all()
    })?;
    let stat = rate(many, || {
        (0..ACCESSES).try_for_each(|_| fs::metadata(&path).map(drop))
    })?;
    let create_unlink = rate(many, || {
        (0..ACCESSES).try_for_each(|n| {
            let path = dir.join(format!("new-{n}"));
            File::create(&path)?;
            fs::remove_file(&path)
        })
    })?;
    fs::remove_file(&path)?;
    let values = [write, read, random_read, random_write, stat, create_unlink];
    let figures: serde_json::Map<String, Value> = FIGURES
        .iter()
        .zip(values)
        .map(|((name, _), value)| ((*name).to_owned(), value.into()))
        .collect();
    println!("{}", Value::Object(figures));
    Ok(())
}

/// How many of `units` a second.
fn rate(units: f64, work: impl FnOnce() -> std::io::Result<()>) -> Result<f64> {
    let begin = Instant::now();
    work()?;
    Ok(units / begin.elapsed().as_secs_f64())
}

/// Opens a file whose pages this kernel does not hold.
fn uncached(path: &Path) -> std::io::Result<File> {
    let file = File::open(path)?;
    nix::fcntl::posix_fadvise(
        &file,
        0,
        0,
        nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    )?;
    Ok(file)
}

/// Block offsets in an order without a pattern, the same every time.
fn offsets() -> impl Iterator<Item = u64> {
    let blocks = (FILE / BLOCK) as u64;
    // A multiplicative step coprime to a power of two visits every block once.
    (0..ACCESSES as u64).map(move |n| (n.wrapping_mul(2_654_435_761) % blocks) * BLOCK as u64)
}
