//! `file://`: a log file, appended to.

use std::io;
use std::path::Path;

use tokio::fs::{DirBuilder, File, OpenOptions};
use tokio::io::AsyncWriteExt as _;

/// Opens for appending; makes the file (0644) and its directories (0755) where they are not there, as runc's shim does.
pub(super) async fn append_or_create(path: &Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)
            .await?;
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .open(path)
        .await
}

/// Writes all of it through to the kernel: the tokio file alone would keep it in memory.
pub(super) async fn write(file: &mut File, data: &[u8]) -> io::Result<()> {
    file.write_all(data).await?;
    file.flush().await
}
