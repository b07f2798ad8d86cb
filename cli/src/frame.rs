//! What a monitor and whoever is attached to its container say to each other: frames on a stream, one byte that says what, four for
//! the length (little-endian), the data.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// The most data of a frame, in bytes.
const MOST: usize = 64 << 10;

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// To the container's input.
    Input(Vec<u8>),
    /// The input's end.
    InputEnd,
    /// The size of the terminal: rows and columns.
    Size(u16, u16),
    /// To the container's first process.
    Signal(u32),
    /// The attached one leaves, and its input goes on.
    Detach,
    /// From the container's standard output, or its terminal.
    Output(Vec<u8>),
    /// From its standard error.
    Error(Vec<u8>),
    /// It has ended, with this code.
    Exit(u32),
}

impl Frame {
    /// Reads the next one; `None` at the stream's end.
    pub(crate) async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let mut head = [0; 5];
        match from.read_exact(&mut head).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        };
        let [kind, a, b, c, d] = head;
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        if length > MOST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut data = vec![0; length];
        from.read_exact(&mut data).await?;
        let frame = match (kind, &*data) {
            (0, _) => Self::Input(data),
            (1, []) => Self::InputEnd,
            (2, &[a, b, c, d]) => {
                Self::Size(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
            }
            (3, []) => Self::Detach,
            (4, &[a, b, c, d]) => Self::Signal(u32::from_le_bytes([a, b, c, d])),
            (16, _) => Self::Output(data),
            (17, _) => Self::Error(data),
            (18, &[a, b, c, d]) => Self::Exit(u32::from_le_bytes([a, b, c, d])),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        Ok(Some(frame))
    }

    /// Writes it; data that is more than one frame may have becomes several.
    pub(crate) async fn write(&self, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        let mut small = Vec::new();
        let (kind, data): (u8, &[u8]) = match self {
            Self::Input(data) => (0, data),
            Self::InputEnd => (1, &[]),
            Self::Size(rows, columns) => {
                small.extend(rows.to_le_bytes());
                small.extend(columns.to_le_bytes());
                (2, &small)
            }
            Self::Detach => (3, &[]),
            Self::Signal(number) => {
                small.extend(number.to_le_bytes());
                (4, &small)
            }
            Self::Output(data) => (16, data),
            Self::Error(data) => (17, data),
            Self::Exit(code) => {
                small.extend(code.to_le_bytes());
                (18, &small)
            }
        };
        let mut rest = data;
        loop {
            let (part, more) = rest.split_at(rest.len().min(MOST));
            let mut bytes = vec![kind];
            bytes.extend((part.len() as u32).to_le_bytes());
            bytes.extend(part);
            to.write_all(&bytes).await?;
            if more.is_empty() {
                return Ok(());
            }
            rest = more;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(future)
    }

    #[test]
    fn frames_arrive_as_they_were_sent() {
        let frames = [
            Frame::Input(b"in".to_vec()),
            Frame::InputEnd,
            Frame::Size(24, 80),
            Frame::Detach,
            Frame::Signal(15),
            Frame::Output(vec![7; MOST]),
            Frame::Error(Vec::new()),
            Frame::Exit(137),
        ];
        block_on(async {
            let mut bytes = Vec::new();
            for frame in &frames {
                frame.write(&mut bytes).await.unwrap();
            }
            let mut rest = &*bytes;
            for frame in frames {
                assert_eq!(Frame::read(&mut rest).await.unwrap(), Some(frame));
            }
            assert_eq!(Frame::read(&mut rest).await.unwrap(), None);
        });
    }

    #[test]
    fn long_data_becomes_several_frames_and_nonsense_none() {
        block_on(async {
            let mut bytes = Vec::new();
            Frame::Output(vec![1; MOST + 1])
                .write(&mut bytes)
                .await
                .unwrap();
            let mut rest = &*bytes;
            let lengths = [MOST, 1].map(|length| Frame::Output(vec![1; length]));
            for wanted in lengths {
                assert_eq!(Frame::read(&mut rest).await.unwrap(), Some(wanted));
            }
            for nonsense in [
                &[9, 0, 0, 0, 0][..],
                &[0, 255, 255, 255, 255],
                &[18, 1, 0, 0, 0, 0],
            ] {
                assert!(Frame::read(&mut &*nonsense).await.is_err());
            }
        });
    }
}
