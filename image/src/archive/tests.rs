use proptest::prelude::*;

use super::*;

/// A block for each header or piece of data, padded.
fn blocks(parts: &[&[u8]]) -> Vec<u8> {
    let mut all = Vec::new();
    for part in parts {
        all.extend(*part);
        all.resize(all.len().next_multiple_of(BLOCK), 0);
    }
    all.resize(all.len() + 2 * BLOCK, 0);
    all
}

fn header(kind: u8, name: &str, size: u64) -> Vec<u8> {
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::new(kind));
    header.set_path(name).unwrap();
    header.set_size(size);
    header.set_mode(0o100_644);
    header.set_uid(1000);
    header.set_gid(100);
    header.set_mtime(1_700_000_000);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut all = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let length = (1..6)
            .map(|digits| digits + rest)
            .find(|length| length.to_string().len() + rest == *length)
            .unwrap();
        all.extend(format!("{length} {key}=").bytes());
        all.extend(*value);
        all.push(b'\n');
    }
    all
}

/// All entries with their data.
fn read(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, ArchiveError> {
    let mut archive = Archive::new(archive);
    let mut all = Vec::new();
    while let Some(entry) = archive.next_entry()? {
        let mut data = Vec::new();
        let mut buffer = [0; 100];
        loop {
            match archive.read_data(&mut buffer)? {
                0 => break,
                count => data.extend(&buffer[..count]),
            }
        }
        all.push((entry, data));
    }
    Ok(all)
}

fn one(archive: &[u8]) -> (Entry, Vec<u8>) {
    let mut all = read(archive).unwrap();
    assert_eq!(all.len(), 1);
    all.remove(0)
}

fn complaint(archive: &[u8]) -> String {
    read(archive).unwrap_err().to_string()
}

#[test]
fn a_file_is_what_its_header_says() {
    let (entry, data) = one(&blocks(&[&header(b'0', "a/b", 3), b"abc"]));
    assert_eq!(data, b"abc");
    assert_eq!(
        entry,
        Entry {
            name: b"a/b".into(),
            link: vec![],
            kind: Kind::File,
            mode: 0o644,
            uid: 1000,
            gid: 100,
            mtime: Time {
                seconds: 1_700_000_000,
                nanoseconds: 0
            },
            device: (0, 0),
            xattrs: vec![],
            size: 3,
            extents: None,
        }
    );
}

#[test]
fn pax_records_take_the_headers_place_for_one_entry() {
    let long = "d/".repeat(200) + "file";
    let capability = b"\x01\0\0\x02\n=1 2\n";
    let records = pax(&[
        ("path", b"first, and replaced"),
        ("path", long.as_bytes()),
        ("size", b"4"),
        ("uid", b"3000000"),
        ("gid", b"3000001"),
        ("mtime", b"-1.25"),
        ("SCHILY.xattr.security.capability", capability),
        ("comment", b"any"),
    ]);
    let archive = blocks(&[
        &header(b'x', "pax", records.len() as u64),
        &records,
        &header(b'0', "short", 0),
        b"data",
        &header(b'0', "next", 0),
    ]);
    let all = read(&archive).unwrap();
    let (entry, data) = &all[0];
    assert_eq!(entry.name, long.as_bytes());
    assert_eq!((entry.uid, entry.gid), (3_000_000, 3_000_001));
    let before = Time {
        seconds: -2,
        nanoseconds: 750_000_000,
    };
    assert_eq!(entry.mtime, before);
    let xattr = (b"security.capability".to_vec(), capability.to_vec());
    assert_eq!(entry.xattrs, [xattr]);
    assert_eq!(data, b"data");
    assert_eq!(all[1].0.name, b"next");
    assert_eq!(all[1].0.uid, 1000);
}

#[test]
fn global_records_are_passed_over() {
    let global = pax(&[("mtime", b"7"), ("path", b"other")]);
    let length = global.len() as u64;
    let archive = blocks(&[
        &header(b'g', "global", length),
        &global,
        &header(b'5', "a", 0),
    ]);
    let (entry, _) = one(&archive);
    assert_eq!(
        (&*entry.name, entry.mtime.seconds),
        (&b"a"[..], 1_700_000_000)
    );
    // Whatever it says, and however much.
    let noise = vec![9; 3 << 20];
    let archive = blocks(&[&header(b'g', "g", 3 << 20), &noise, &header(b'5', "a", 0)]);
    assert_eq!(one(&archive).0.name, b"a");
}

#[test]
fn empty_records_take_earlier_ones_back() {
    let records = pax(&[
        ("path", b"other"),
        ("uid", b"5"),
        ("path", b""),
        ("uid", b""),
    ]);
    let x = header(b'x', "pax", records.len() as u64);
    let (entry, _) = one(&blocks(&[&x, &records, &header(b'5', "a", 0)]));
    assert_eq!((&*entry.name, entry.uid), (&b"a"[..], 1000));
}

#[test]
fn only_files_have_data() {
    let mut old = Header::from_byte_slice(&header(b'0', "old-directory/", 4096)).clone();
    old.as_old_mut().linkflag = [0];
    old.set_cksum();
    // As some archives have directories and links: with the size of something.
    let archive = blocks(&[
        &header(b'5', "d", 4096),
        &header(b'1', "l", 4096),
        old.as_bytes(),
        &header(b'0', "f/", 1),
        b"x",
    ]);
    let all = read(&archive).unwrap();
    let kinds: Vec<_> = all.iter().map(|(entry, _)| entry.kind).collect();
    let expected = [Kind::Directory, Kind::HardLink, Kind::Directory, Kind::File];
    assert_eq!(kinds, expected);
    assert_eq!(all[3].1, b"x");
}

#[test]
fn gnu_long_names() {
    let name = "n/".repeat(300) + "x";
    let link = "l/".repeat(300) + "y";
    let (with_nul, length) = (format!("{name}\0"), name.len() as u64 + 1);
    let archive = blocks(&[
        &header(b'L', "././@LongLink", length),
        with_nul.as_bytes(),
        &header(b'K', "././@LongLink", link.len() as u64),
        link.as_bytes(),
        &header(b'2', "cut", 0),
    ]);
    let (entry, _) = one(&archive);
    assert_eq!((entry.name, entry.link), (name.into(), link.into()));
    assert_eq!(entry.kind, Kind::Symlink);
}

#[test]
fn sparse_files_of_all_formats() {
    let extents = [(0, 3), (1000, 2)].map(|(offset, length)| Extent { offset, length });
    let seen = |archive: &[u8]| {
        let (entry, data) = one(archive);
        assert_eq!(data, b"abcde");
        assert_eq!(entry.extents.as_deref(), Some(&extents[..]));
        assert_eq!(entry.size, 2000);
        String::from_utf8(entry.name).unwrap()
    };
    // GNU 1.0: the map is in front of the data.
    let records = pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"real"),
        ("GNU.sparse.realsize", b"2000"),
    ]);
    let map = blocks(&[b"2\n0\n3\n1000\n2\n"]);
    let data = [&map[..BLOCK], b"abcde"].concat();
    let x = header(b'x', "pax", records.len() as u64);
    let file = header(b'0', "GNUSparseFile.1/real", data.len() as u64);
    assert_eq!(seen(&blocks(&[&x, &records, &file, &data])), "real");
    // 0.1: in one record.
    let records = pax(&[
        ("GNU.sparse.size", b"2000"),
        ("GNU.sparse.map", b"0,3,1000,2"),
    ]);
    let x = header(b'x', "pax", records.len() as u64);
    let file = header(b'0', "old", 5);
    assert_eq!(seen(&blocks(&[&x, &records, &file, b"abcde"])), "old");
    // 0.0: in many.
    let records = pax(&[
        ("GNU.sparse.size", b"2000"),
        ("GNU.sparse.offset", b"0"),
        ("GNU.sparse.numbytes", b"3"),
        ("GNU.sparse.offset", b"1000"),
        ("GNU.sparse.numbytes", b"2"),
    ]);
    let x = header(b'x', "pax", records.len() as u64);
    assert_eq!(seen(&blocks(&[&x, &records, &file, b"abcde"])), "old");
    // Before pax: in the header, and in a block after it.
    let mut file = Header::new_gnu();
    file.set_entry_type(EntryType::GNUSparse);
    file.set_path("older").unwrap();
    file.set_size(5);
    file.set_mode(0o600);
    file.set_uid(0);
    file.set_gid(0);
    file.set_mtime(0);
    let gnu = file.as_gnu_mut().unwrap();
    let octal = |field: &mut [u8], value: u64| {
        let text = format!("{value:0width$o}\0", width = field.len() - 1);
        field.copy_from_slice(text.as_bytes());
    };
    octal(&mut gnu.sparse[0].offset, 0);
    octal(&mut gnu.sparse[0].numbytes, 3);
    gnu.isextended[0] = 1;
    octal(&mut gnu.realsize, 2000);
    file.set_cksum();
    let mut more = tar::GnuExtSparseHeader::new();
    octal(&mut more.sparse[0].offset, 1000);
    octal(&mut more.sparse[0].numbytes, 2);
    let archive = blocks(&[file.as_bytes(), more.as_bytes(), b"abcde"]);
    assert_eq!(seen(&archive), "older");
}

#[test]
fn sparse_files_that_cannot_be() {
    for map in [
        "0,3,2,2",
        "1000,5",
        "1999,2",
        "0,4",
        "0,18446744073709551615,5,5",
        "1",
        "0,x",
    ] {
        let records = pax(&[
            ("GNU.sparse.size", b"2000"),
            ("GNU.sparse.map", map.as_bytes()),
        ]);
        let x = header(b'x', "pax", records.len() as u64);
        let archive = blocks(&[&x, &records, &header(b'0', "f", 5), b"abcde"]);
        match map {
            "1000,5" => assert!(read(&archive).is_ok()),
            _ => assert!(complaint(&archive).contains("sparse"), "{map}"),
        }
    }
}

#[test]
fn what_is_no_archive_says_so() {
    assert!(complaint(&[7; BLOCK]).contains("not a tar archive"));
    assert!(complaint(&[7; 100]).contains("incomplete"));
    let good = blocks(&[&header(b'0', "whole", 600), &[1; 600]]);
    assert!(complaint(&good[..BLOCK + 100]).contains("\"whole\""));
    // Data of a file that is passed over must be there, too.
    let mut archive = Archive::new(&good[..BLOCK + 100]);
    archive.next_entry().unwrap();
    assert!(matches!(
        archive.next_entry(),
        Err(ArchiveError::Truncated(_))
    ));
    assert!(complaint(&blocks(&[&header(b'Z', "odd", 0)])).contains("unknown kind"));
    let records = pax(&[("uid", b"4294967295")]);
    let x = header(b'x', "pax", records.len() as u64);
    assert!(complaint(&blocks(&[&x, &records, &header(b'5', "d", 0)])).contains("user"));
    assert!(complaint(&blocks(&[&x, &records])).contains("the last"));
    let good = header(b'5', "d", 0);
    let gap = [&good[..], &[0; BLOCK], &good].concat();
    assert!(complaint(&blocks(&[&gap])).contains("behind the block"));
}

#[test]
fn headers_that_extend_others_are_bounded() {
    for kind in [b'x', b'L', b'K'] {
        let text = complaint(&blocks(&[&header(kind, "bomb", 1 << 32)]));
        assert!(text.contains("the most is"), "{text}");
    }
}

#[test]
fn an_archive_may_end_without_its_two_blocks() {
    let archive = blocks(&[&header(b'5', "d", 0)]);
    for end in [BLOCK, 2 * BLOCK, 3 * BLOCK] {
        assert_eq!(read(&archive[..end]).unwrap().len(), 1);
    }
    assert!(read(&[]).unwrap().is_empty());
}

proptest! {
    #[test]
    fn any_records_are_survived(text in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Records::default().parse(&text);
    }

    #[test]
    fn any_record_comes_back(key in "[a-z.]{1,20}", value in proptest::collection::vec(any::<u8>(), 0..200)) {
        let key = format!("SCHILY.xattr.{key}");
        let mut records = Records::default();
        records.parse(&pax(&[(&key, &value)])).unwrap();
        prop_assert_eq!(&records.xattrs[0].1, &value);
    }

    /// Headers whose sum is right, with anything in them.
    #[test]
    fn any_header_is_survived(
        kind in prop::sample::select(&b"0123456789xgLKSVZ\0"[..]),
        at in 0..500_usize, noise in proptest::collection::vec(any::<u8>(), 0..12),
        data in proptest::collection::vec(any::<u8>(), 0..2000),
    ) {
        let mut block = header(kind, "n", 700);
        for (place, byte) in block.iter_mut().skip(at).zip(&noise) {
            *place = *byte;
        }
        let mut bytes = [0; BLOCK];
        bytes.copy_from_slice(&block);
        let mut header = Header::from_byte_slice(&bytes).clone();
        header.set_cksum();
        let _ = read(&blocks(&[header.as_bytes(), &data]));
    }
}
