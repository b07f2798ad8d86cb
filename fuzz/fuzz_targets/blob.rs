//! A layer's bytes, compressed or not, read to the end: bounded, whatever they are. The checksums of tar headers are made right, as no
//! fuzzer would come upon them.
#![no_main]

use std::io::{self, BufReader, Read as _};

use husk_fuzz::tarball::mend;
use husk_image::{
    archive::{Archive, ArchiveError},
    layer::{Layer, Limits},
};
use libfuzzer_sys::fuzz_target;

/// Enough for a ratio to be told, and soon read.
const LIMITS: Limits = Limits {
    bytes: 4 << 20,
    ratio: 500,
};

fuzz_target!(|blob: &[u8]| {
    // What is in a compressed stream must be mended behind the decoder.
    let Ok(layer) = Layer::new(blob, LIMITS) else {
        return;
    };
    let mut tar = Vec::new();
    let read = layer.take(LIMITS.bytes + 1).read_to_end(&mut tar);
    assert!(
        tar.len() as u64 <= LIMITS.bytes + (256 << 10),
        "{}",
        tar.len()
    );
    if read.is_ok() {
        let summary = Layer::new(blob, LIMITS).unwrap().finish().unwrap();
        assert_eq!(
            (summary.size, summary.unpacked),
            (blob.len() as u64, tar.len() as u64)
        );
    }
    mend(&mut tar);
    if let Err(error) = walk(&tar) {
        let _ = error.to_string();
    }
});

fn walk(tar: &[u8]) -> Result<(), ArchiveError> {
    let mut archive = Archive::new(BufReader::new(tar));
    let mut buffer = [0; 1000];
    let mut number = 0;
    while let Some(entry) = archive.next_entry()? {
        let _ = entry.display_name();
        let held = entry.name.len()
            + entry.link.len()
            + entry
                .xattrs
                .iter()
                .map(|(k, v)| k.len() + v.len())
                .sum::<usize>();
        assert!(held <= tar.len() && held <= 4 << 20, "{held}");
        assert!(entry.mtime.nanoseconds < 1_000_000_000);
        let data = match &entry.extents {
            Some(extents) => extents.iter().map(|extent| extent.length).sum(),
            None => entry.size,
        };
        // Some are passed over.
        number += 1;
        if number % 3 > 0 {
            let mut found = 0;
            loop {
                match archive.read_data(&mut buffer)? {
                    0 => break,
                    count => found += count as u64,
                }
            }
            assert_eq!(found, data);
        }
    }
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(ArchiveError::Read)?;
    Ok(())
}
