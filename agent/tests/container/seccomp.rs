//! The filter as processes meet it.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use crate::support::Bundle;

#[tokio::test]
async fn seccomp_with_and_without_new_privileges() {
    for no_new_privileges in [true, false] {
        let output = Bundle::sh("grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t'; mount -t tmpfs t /tmp; unshare -U true")
            .with("/process/noNewPrivileges", json!(no_new_privileges))
            .with("/process/capabilities/effective", json!(["CAP_SYS_ADMIN"]))
            .with("/process/capabilities/permitted", json!(["CAP_SYS_ADMIN"]))
            .with("/process/capabilities/bounding", json!(["CAP_SYS_ADMIN"]))
            .run()
            .await;
        let flag = i32::from(no_new_privileges);
        assert_eq!(
            output.stdout,
            format!("NoNewPrivs:{flag}\nSeccomp:2\n"),
            "{output:?}"
        );
        // CAP_SYS_ADMIN would allow both: it is the filter that does not.
        assert!(
            output.stderr.contains("mount") && output.stderr.contains("unshare"),
            "{output:?}"
        );
        assert!(output.stderr.contains("not permitted"), "{output:?}");
    }
    let killed = Bundle::sh("mkdir /x; echo alive")
        .with(
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW",
                   "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_KILL_PROCESS"}]}),
        )
        .run()
        .await;
    assert_eq!(killed.stdout, "alive\n", "{killed:?}");
    let off = Bundle::sh("grep ^Seccomp: /proc/self/status")
        .with("/linux/seccomp", json!(null))
        .run()
        .await;
    assert_eq!(off.stdout, "Seccomp:\t0\n");
}

#[tokio::test]
async fn a_profile_older_than_close_range_lets_its_container_start() {
    let mut bundle =
        Bundle::sh("ls /proc/self/fd | wc -l").with("/process/noNewPrivileges", json!(false));
    let names = bundle
        .spec
        .pointer_mut("/linux/seccomp/syscalls/0/names")
        .unwrap()
        .as_array_mut()
        .unwrap();
    let before = names.len();
    names.retain(|name| name != "close_range");
    assert_eq!(names.len(), before - 1);
    // The standard streams and the directory itself.
    let output = bundle.run().await;
    assert_eq!(output.stdout, "4\n", "{output:?}");
}

/// A 32-bit program: write(1, "hi\n", 3), then add_key(0, …), then exit with that call's error number.
fn i386_program() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    let mut code = vec![0xb8, 4, 0, 0, 0, 0xbb, 1, 0, 0, 0, 0xb9];
    let text_at = code.len();
    code.extend([0, 0, 0, 0, 0xba, 3, 0, 0, 0, 0xcd, 0x80]);
    // eax = 286 (add_key), ebx = ecx = 0: a null pointer, if the call gets as far as looking.
    code.extend([0xb8, 0x1e, 1, 0, 0, 0x31, 0xdb, 0x31, 0xc9, 0xcd, 0x80]);
    // ebx = -eax, eax = 1 (exit)
    code.extend([0xf7, 0xd8, 0x89, 0xc3, 0xb8, 1, 0, 0, 0, 0xcd, 0x80]);
    let text = BASE + HEADERS + u32::try_from(code.len()).unwrap();
    code[text_at..text_at + 4].copy_from_slice(&text.to_le_bytes());
    code.extend(b"hi\n");
    let size = HEADERS + u32::try_from(code.len()).unwrap();
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    for word in [1, BASE + HEADERS, 52, 0, 0, 52 | 32 << 16, 1, 0] {
        file.extend(u32::to_le_bytes(word));
    }
    for word in [1, 0, BASE, BASE, size, size, 5, 0x1000] {
        file.extend(u32::to_le_bytes(word));
    }
    file.extend(code);
    file
}

#[tokio::test]
async fn a_32_bit_program_runs_under_the_same_profile() {
    let bundle = Bundle::new(&["/i386"]);
    let path = bundle.root().join("i386");
    fs::write(&path, i386_program()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let output = bundle.run().await;
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (nix::errno::Errno::EPERM as i32, "hi\n")
    );
}
