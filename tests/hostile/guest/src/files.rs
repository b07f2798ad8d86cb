//! Requests that lead out of the share, or would if the file server believed them.
//!
//! The command line names a file of the volume that the pod was given (`marker`), and a directory of the host that it was not
//! (`canary`), in which there is a file `secret`.

use crate::check;
use crate::fuse::{
    BATCH_FORGET, COPY_FILE_RANGE, CREATE, FORGET, GETATTR, LINK, LOOKUP, MKDIR, MKNOD, OPEN,
    OPENDIR, READ, READDIR, READLINK, RELEASE, RENAME2, RMDIR, ROOT, Request, SETATTR,
    SETUPMAPPING, SETXATTR, SYMBOLIC_LINK, SYMLINK, Session, TYPE, UNLINK,
};
use crate::machine::read;
use crate::start::Start;
use crate::virtio::{Device, FS};

const EINVAL: i32 = 22;
const ENFILE: i32 = 23;
/// Bounds of what the VMM of the test, whose descriptors are few, lets its guest hold.
const FEW: u32 = 300;
const MANY: u32 = 3000;
/// `O_RDWR`.
const BOTH_WAYS: u32 = 2;
/// `RENAME_EXCHANGE`.
const EXCHANGE: u64 = 2;

/// A name put together.
struct Name {
    bytes: [u8; 512],
    len: usize,
}

impl Name {
    fn of(pieces: &[&str]) -> Self {
        let mut name = Self {
            bytes: [0; 512],
            len: 0,
        };
        for byte in pieces.iter().flat_map(|piece| piece.bytes()) {
            name.bytes[name.len] = byte;
            name.len += 1;
        }
        name
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

const UP: &str = "../../../../../../../../../../../..";

/// Tries all of it.
pub fn attack(start: &Start) {
    let Some(device) = Device::find(FS) else {
        check!(false, "no share to attack");
        return;
    };
    let mut session = Session::new(device);
    let marker = start.word("marker").as_bytes();
    let Some(volume) = session.volume(start) else {
        return;
    };
    let canary = start.word("canary");
    names(&mut session, volume, canary);
    links(&mut session, volume, canary);
    mount_points(&mut session);
    special_files(&mut session, volume);
    handles(&mut session, volume);
    lengths(&mut session, volume);
    one_head_many_times(&mut session);
    races(&mut session, volume, canary);
    // An honest request, after all this.
    let found = session.lookup(volume, marker);
    check!(found.is_ok(), "the volume is served as before");
}

/// More files than the server lets a guest hold: it says so, and after some are closed it goes on.
pub fn hold_open(start: &Start) {
    let Some(device) = Device::find(FS) else {
        check!(false, "no share to attack");
        return;
    };
    let mut session = Session::new(device);
    let Some(volume) = session.volume(start) else {
        return;
    };
    let Ok((node, handle)) = session.create(volume, b"held") else {
        check!(false, "no file to hold");
        return;
    };
    // Open files, of one inode.
    let mut last = handle;
    let mut held = 1;
    let refused = loop {
        match session.open(OPEN, node.id, 0) {
            Ok(handle) => (last, held) = (handle, held + 1),
            Err(error) => break error,
        }
        if held > MANY {
            break 0;
        }
    };
    check!(
        refused == ENFILE && held > FEW,
        "refused with {refused} after {held} open files"
    );
    let marker = start.word("marker").as_bytes();
    let further = session.lookup(volume, marker).map(|node| node.id);
    check!(
        further.is_ok(),
        "what it knows is looked up still ({further:?})"
    );
    let release = [last, 0, 0].map(u64::to_le_bytes);
    let closed = session.call(RELEASE, node.id, &[release.as_flattened()]);
    let again = session.open(OPEN, node.id, 0);
    check!(
        closed.is_ok() && again.is_ok(),
        "one for another ({closed:?} {again:?})"
    );
    // The session's end closes them all. Then inodes, each of which the server holds a file for.
    let mut session = Session::new(device);
    let Some(volume) = session.volume(start) else {
        return;
    };
    let mut known = 0;
    let refused = loop {
        match session.lookup(volume, &number(known)) {
            Ok(_) => known += 1,
            Err(error) => break error,
        }
    };
    // The test has made more of them than there may be.
    check!(
        refused == ENFILE && known > FEW,
        "refused with {refused} after {known} inodes"
    );
    let opened = session.create(volume, b"no more").map(|(node, _)| node.id);
    check!(opened == Err(ENFILE), "and no file is made ({opened:?})");
    let mut session = Session::new(device);
    check!(session.volume(start).is_some(), "another session is served");
}

/// The name of a file that the test has made.
fn number(number: u32) -> [u8; 6] {
    let mut rest = number;
    let mut name = [0; 6];
    for digit in name.iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    name
}

/// Names that are paths.
fn names(session: &mut Session, volume: u64, canary: &str) {
    let up_to = |file: &str| Name::of(&[UP, canary, file]);
    let (secret, planted) = (up_to("/secret"), up_to("/planted"));
    let straight = Name::of(&[canary, "/secret"]);
    for parent in [ROOT, volume] {
        for name in [
            b"..",
            &b"../.."[..],
            b".",
            b"",
            b"/",
            b"/etc",
            b"x/../../x",
            secret.bytes(),
            straight.bytes(),
        ] {
            let found = session.lookup(parent, name).map(|node| node.id);
            let shown = core::str::from_utf8(name).unwrap_or_default();
            check!(found == Err(EINVAL), "looked up {shown:?} ({found:?})");
        }
        let created = session
            .create(parent, planted.bytes())
            .map(|(node, _)| node.id);
        check!(
            created == Err(EINVAL),
            "created a file outside ({created:?})"
        );
        let out = planted.bytes();
        let fixed = [0; 16];
        let by_node = volume.to_le_bytes();
        let renamed = [&by_node[..], &fixed[..8]].concat_into();
        let attempts: [(&str, u32, &[&[u8]]); 7] = [
            ("a directory", MKDIR, &[&fixed[..8], out, &[0]]),
            ("a node", MKNOD, &[&fixed, out, &[0]]),
            ("a link", SYMLINK, &[out, &[0], b"x", &[0]]),
            ("a hard link", LINK, &[&by_node, out, &[0]]),
            ("the removal of a file", UNLINK, &[secret.bytes(), &[0]]),
            ("the removal of a directory", RMDIR, &[out, &[0]]),
            ("a new name", RENAME2, &[&renamed, b"x", &[0], out, &[0]]),
        ];
        for (what, op, body) in attempts {
            let done = session.call(op, parent, body);
            check!(done == Err(EINVAL), "{what} outside ({done:?})");
        }
    }
}

trait ConcatInto {
    fn concat_into(&self) -> [u8; 16];
}

impl ConcatInto for [&[u8]; 2] {
    fn concat_into(&self) -> [u8; 16] {
        let mut all = [0; 16];
        for (to, from) in all
            .iter_mut()
            .zip(self.iter().flat_map(|piece| piece.iter()))
        {
            *to = *from;
        }
        all
    }
}

/// Symbolic links: the server follows none, whoever asks for what.
fn links(session: &mut Session, volume: u64, canary: &str) {
    let relative = Name::of(&[UP, canary]);
    for (name, target) in [
        ("out", canary.as_bytes()),
        ("up", relative.bytes()),
        ("proc", b"/proc/self/root"),
    ] {
        let link = match session.link_to(volume, name.as_bytes(), target) {
            Ok(link) => link,
            Err(error) => {
                check!(false, "no link to attack by ({error})");
                continue;
            }
        };
        check!(
            link.mode & TYPE == SYMBOLIC_LINK,
            "{name} is told for a link"
        );
        let said = session.call(READLINK, link.id, &[]);
        check!(
            said == Ok(target.len() as u64),
            "{name} says its target ({said:?})"
        );
        let inside = session.lookup(link.id, b"secret").map(|node| node.id);
        check!(inside.is_err(), "{name}: looked up behind it ({inside:?})");
        for (what, op, flags) in [
            ("open", OPEN, 0),
            ("open to write", OPEN, BOTH_WAYS),
            ("open as directory", OPENDIR, 0),
        ] {
            let opened = session.open(op, link.id, flags);
            check!(opened.is_err(), "{name}: {what} ({opened:?})");
        }
        let created = session.create(link.id, b"planted").map(|(node, _)| node.id);
        check!(created.is_err(), "{name}: created behind it ({created:?})");
        let made = session
            .make_directory(link.id, b"planted")
            .map(|node| node.id);
        check!(made.is_err(), "{name}: a directory behind it ({made:?})");
        // Where it is replaced or opened by its name, too.
        let created = session
            .create(volume, name.as_bytes())
            .map(|(node, _)| node.id);
        check!(
            created.is_err(),
            "{name}: created by its name ({created:?})"
        );
        // fuse_setattr_in: FATTR_MODE, and the mode at its place.
        let mut chmod = [0; 88];
        chmod[0] = 1;
        chmod[68..70].copy_from_slice(&0o777u16.to_le_bytes());
        let changed = session.call(SETATTR, link.id, &[&chmod]);
        check!(
            true,
            "{name}: its mode ({changed:?}), which the host's look at the canary judges"
        );
        // FATTR_SIZE.
        let mut truncate = [0; 88];
        truncate[0] = 8;
        let changed = session.call(SETATTR, link.id, &[&truncate]);
        check!(changed.is_err(), "{name}: cut short ({changed:?})");
        let attribute = session.call(
            SETXATTR,
            link.id,
            &[&1u32.to_le_bytes(), &[0; 4], b"user.x", &[0], b"v"],
        );
        check!(attribute.is_err(), "{name}: an attribute ({attribute:?})");
    }
}

/// What the share itself is made of is not the guest's.
fn mount_points(session: &mut Session) {
    let made = session.create(ROOT, b"planted").map(|(node, _)| node.id);
    check!(made.is_err(), "a file beside the mounts ({made:?})");
    let made = session.make_directory(ROOT, b"planted").map(|node| node.id);
    check!(made.is_err(), "a directory beside the mounts ({made:?})");
    let mut name = [0; 255];
    let len = session
        .open(OPENDIR, ROOT, 0)
        .and_then(|handle| {
            let mut offset = 0;
            loop {
                let (entry, len) = session.read(READDIR, ROOT, handle, offset, 512)?;
                if len < 25 {
                    return Err(0);
                }
                offset = crate::machine::word::<8>(entry + 8);
                let len = (crate::machine::word::<4>(entry + 16) as usize).min(255);
                read(entry + 24, &mut name[..len]);
                if name[0] != b'.' {
                    return Ok(len);
                }
            }
        })
        .unwrap_or(0);
    let name = &name[..len];
    for (what, op) in [("unlinked", UNLINK), ("removed", RMDIR)] {
        let done = session.call(op, ROOT, &[name, &[0]]);
        check!(
            len > 0 && done.is_err(),
            "a mount's directory {what} ({done:?})"
        );
    }
    let to = [&ROOT.to_le_bytes()[..], &[0; 8]].concat_into();
    let moved = session.call(RENAME2, ROOT, &[&to, name, &[0], b"elsewhere", &[0]]);
    check!(moved.is_err(), "a mount's directory renamed ({moved:?})");
}

/// What is neither file nor directory can be made, and is not opened on the host.
fn special_files(session: &mut Session, volume: u64) {
    for (name, mode, device) in [
        ("fifo", 0o010_644, 0),
        ("socket", 0o140_644, 0),
        ("disk", 0o060_644, 0x800),
        ("memory", 0o020_644, 0x101),
        ("kvm", 0o020_666, 0xae8),
    ] {
        match session.make_node(volume, name.as_bytes(), mode, device) {
            Ok(node) => {
                for flags in [0, BOTH_WAYS, 0o4000] {
                    let opened = session.open(OPEN, node.id, flags);
                    check!(opened.is_err(), "{name}: opened on the host ({opened:?})");
                }
                let created = session
                    .create(volume, name.as_bytes())
                    .map(|(node, _)| node.id);
                check!(created.is_err(), "{name}: opened by its name ({created:?})");
            }
            Err(error) => check!(true, "{name}: not even made ({error})"),
        }
    }
}

/// Handles and nodes that the server has not given.
fn handles(session: &mut Session, volume: u64) {
    for handle in (0..64).chain([1 << 31, 1 << 32, u64::MAX]) {
        let got = session
            .read(READ, volume, handle, 0, 4096)
            .map(|(_, len)| len);
        if got.is_ok() {
            check!(false, "read by the handle {handle} ({got:?})");
        }
    }
    for node in [0, 2 << 40, u64::MAX, 1 << 63] {
        let got = session.call(GETATTR, node, &[&[0; 16]]);
        check!(got.is_err(), "attributes of nobody, {node:#x} ({got:?})");
        let found = session.lookup(node, b"x").map(|node| node.id);
        check!(
            found.is_err(),
            "looked up below nobody, {node:#x} ({found:?})"
        );
        let copied = session.call(COPY_FILE_RANGE, node, &[&[0xff; 56]]);
        check!(copied.is_err(), "copied from nobody ({copied:?})");
    }
    // Forgets have no answer.
    for node in [ROOT, 77, u64::MAX] {
        let forgotten = session.call(FORGET, node, &[&u64::MAX.to_le_bytes()]);
        session.revive();
        check!(true, "forgot {node:#x} ({forgotten:?})");
    }
    let many = session.call(
        BATCH_FORGET,
        0,
        &[&u32::MAX.to_le_bytes(), &[0; 4], &[0xff; 32]],
    );
    session.revive();
    check!(
        session.lookup(ROOT, b"nobody").is_err(),
        "the root is not forgotten ({many:?})"
    );
    if let Ok((node, handle)) = session.create(volume, b"closed") {
        let release = [handle, 0, 0].map(u64::to_le_bytes);
        let release: &[&[u8]] = &[release.as_flattened()];
        let (first, second) = (
            session.call(RELEASE, node.id, release),
            session.call(RELEASE, node.id, release),
        );
        check!(
            first.is_ok(),
            "closed once ({first:?}) and twice ({second:?})"
        );
        let got = session
            .read(READ, node.id, handle, 0, 64)
            .map(|(_, len)| len);
        check!(got.is_err(), "read by a closed handle ({got:?})");
    }
}

/// One request by one head, many times at once: the threads of the server have it side by side.
fn one_head_many_times(session: &mut Session) {
    let request = Request {
        op: GETATTR,
        node: ROOT,
        body: &[&[0; 16]],
    };
    let answered = session.many_times(&request, 32);
    check!(answered == 32, "one head 32 times ({answered} answered)");
}

/// Lengths that are not those of what is there, and requests that are none.
fn lengths(session: &mut Session, volume: u64) {
    for len in [0, 1, 39, 41, 4096, 1 << 30, u32::MAX] {
        let got = session
            .call_of_length(LOOKUP, volume, &[b"x", &[0]], Some(len))
            .map(drop);
        session.revive();
        check!(
            got.is_err(),
            "a request that says it has {len} bytes ({got:?})"
        );
    }
    for op in [0, 7, 19, 52, 99, 4095, 4096, u32::MAX, SETUPMAPPING] {
        let got = session.call(op, volume, &[&[0xff; 128]]).map(drop);
        session.revive();
        check!(got.is_err(), "operation {op} ({got:?})");
    }
    for op in [
        LOOKUP, CREATE, MKDIR, MKNOD, LINK, RENAME2, SETXATTR, READ, READDIR, SYMLINK, UNLINK,
    ] {
        let got = session.call(op, volume, &[]).map(drop);
        session.revive();
        check!(got.is_err(), "operation {op} without a body ({got:?})");
    }
    if let Ok((node, handle)) = session.create(volume, b"lengths") {
        for (offset, said) in [(0, u32::MAX), (0, 4096), (u64::MAX, 8), (1 << 63, 8)] {
            let done = session.write(node.id, handle, offset, said, b"12345678");
            session.revive();
            check!(true, "wrote 8 bytes as {said} at {offset:#x} ({done:?})");
        }
        let got = session
            .read(READ, node.id, handle, 0, u32::MAX)
            .map(|(_, len)| len);
        session.revive();
        check!(true, "read without end ({got:?})");
    }
}

/// A directory is exchanged for a link to the canary while it is looked up and written to.
fn races(session: &mut Session, volume: u64, canary: &str) {
    let made = session.make_directory(volume, b"turn");
    let link = session.link_to(volume, b"swap", canary.as_bytes());
    check!(
        made.is_ok() && link.is_ok(),
        "a directory and a link to exchange"
    );
    let exchange = [volume, EXCHANGE].map(u64::to_le_bytes);
    let create = [0o102u32, 0o100_644, 0, 0].map(u32::to_le_bytes);
    let mut outside = 0;
    for _ in 0..100 {
        let Ok(node) = session.lookup(volume, b"turn") else {
            continue;
        };
        let [_, created, found, _] = session.at_once([
            Request {
                op: RENAME2,
                node: volume,
                body: &[exchange.as_flattened(), b"turn", &[0], b"swap", &[0]],
            },
            Request {
                op: CREATE,
                node: node.id,
                body: &[create.as_flattened(), b"planted", &[0]],
            },
            Request {
                op: LOOKUP,
                node: node.id,
                body: &[b"secret", &[0]],
            },
            Request {
                op: RENAME2,
                node: volume,
                body: &[exchange.as_flattened(), b"turn", &[0], b"swap", &[0]],
            },
        ]);
        let is_link = node.mode & TYPE == SYMBOLIC_LINK;
        outside += u32::from(found == 0) + u32::from(is_link && created == 0);
    }
    check!(
        outside == 0,
        "a link swapped in a hundred times ({outside} times it led out)"
    );
}
