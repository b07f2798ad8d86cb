//! The compiler against an interpreter of what it makes: every verdict is compared with the profile's meaning.

use proptest::prelude::*;
use serde_json::json;

use super::*;

const ERRNO: u32 = libc::SECCOMP_RET_ERRNO;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

fn profile(json: serde_json::Value) -> LinuxSeccomp {
    serde_json::from_value(json).unwrap()
}

/// Runs a program as the kernel would.
fn run(program: &[BpfInstruction], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = [0u8; 64];
    data[0..4].copy_from_slice(&number.to_le_bytes());
    data[4..8].copy_from_slice(&arch.to_le_bytes());
    for (slot, argument) in arguments.iter().enumerate() {
        data[16 + 8 * slot..24 + 8 * slot].copy_from_slice(&argument.to_le_bytes());
    }
    let (mut accumulator, mut position) = (0u32, 0usize);
    loop {
        let instruction = &program[position];
        let BpfInstruction { code, jt, jf, k } = *instruction;
        position += 1;
        let mut jump = |holds: bool| position += usize::from(if holds { jt } else { jf });
        match code {
            LOAD => {
                let at = k as usize;
                accumulator = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
            }
            AND => accumulator &= k,
            RETURN => return k,
            JUMP => position += k as usize,
            JUMP_EQUAL => jump(accumulator == k),
            JUMP_GREATER => jump(accumulator > k),
            JUMP_GREATER_EQUAL => jump(accumulator >= k),
            other => panic!("unknown instruction {other:#x}"),
        }
    }
}

#[test]
fn dockers_profile() {
    let text = include_str!("../../../../deploy/seccomp-default.json");
    let compiled = compile(&serde_json::from_str(text).unwrap()).unwrap();
    let native = |number: i64, arguments: [u64; 6]| {
        run(&compiled, AUDIT_ARCH_X86_64, number as u32, arguments)
    };
    assert_eq!(native(libc::SYS_read, [0; 6]), ALLOW);
    assert_eq!(native(libc::SYS_execve, [0; 6]), ALLOW);
    assert_eq!(native(libc::SYS_mount, [0; 6]), ERRNO | 1);
    assert_eq!(native(libc::SYS_keyctl, [0; 6]), ERRNO | 1);
    assert_eq!(
        native(libc::SYS_clone3, [0; 6]),
        ERRNO | libc::ENOSYS as u32
    );
    let clone = |flags: i32| native(libc::SYS_clone, [flags as u64, 0, 0, 0, 0, 0]);
    assert_eq!(clone(libc::CLONE_VM | libc::CLONE_THREAD), ALLOW);
    assert_eq!(clone(libc::CLONE_NEWUSER), ERRNO | 1);
    assert_eq!(clone(libc::CLONE_NEWNS | libc::SIGCHLD), ERRNO | 1);
    let personality = |value: u64| native(libc::SYS_personality, [value, 0, 0, 0, 0, 0]);
    assert_eq!(personality(0), ALLOW);
    assert_eq!(personality(0xffff_ffff), ALLOW);
    assert_eq!(personality(0x20_0000), ERRNO | 1);
    let socket = |family: i32| native(libc::SYS_socket, [family as u64, 0, 0, 0, 0, 0]);
    assert_eq!(socket(libc::AF_INET), ALLOW);
    assert_eq!(socket(libc::AF_VSOCK), ERRNO | 1);
    // Newer than the profile, an x32 call, a 32-bit call, a foreign machine.
    assert_eq!(native(4000, [0; 6]), ERRNO | libc::ENOSYS as u32);
    assert_eq!(native(0x4000_0000, [0; 6]), ERRNO | libc::ENOSYS as u32);
    assert_eq!(run(&compiled, AUDIT_ARCH_I386, 3, [0; 6]), ALLOW);
    assert_eq!(run(&compiled, AUDIT_ARCH_I386, 21, [0; 6]), ERRNO | 1);
    assert_eq!(
        run(&compiled, 0xc000_00b7, 63, [0; 6]),
        libc::SECCOMP_RET_KILL_PROCESS
    );
}

#[test]
fn several_actions_and_precedence() {
    let compiled = compile(&profile(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["mkdir", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
            {"names": ["rmdir"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["umask"], "action": "SCMP_ACT_LOG",
             "args": [{"index": 0, "value": 7, "op": "SCMP_CMP_EQ"}]},
            {"names": ["umask"], "action": "SCMP_ACT_TRAP"},
            {"names": ["getpid"], "action": "SCMP_ACT_ALLOW"},
        ],
    })))
    .unwrap();
    let native =
        |number: i64, first: u64| run(&compiled, AUDIT_ARCH_X86_64, number as u32, [first; 6]);
    assert_eq!(native(libc::SYS_mkdir, 0), ERRNO | 13);
    assert_eq!(native(libc::SYS_rmdir, 0), libc::SECCOMP_RET_KILL_PROCESS);
    assert_eq!(native(libc::SYS_umask, 7), libc::SECCOMP_RET_LOG);
    assert_eq!(native(libc::SYS_umask, 8), libc::SECCOMP_RET_TRAP);
    assert_eq!(native(libc::SYS_getpid, 0), ALLOW);
    assert_eq!(native(4000, 0), ALLOW);
    // i386 is not listed.
    assert_eq!(
        run(&compiled, AUDIT_ARCH_I386, 3, [0; 6]),
        libc::SECCOMP_RET_KILL_PROCESS
    );
}

#[test]
fn one_argument_twice_means_either() {
    let compiled = compile(&profile(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": ["umask"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
            {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"},
        ]}],
    })))
    .unwrap();
    let umask = |value: u64| {
        run(
            &compiled,
            AUDIT_ARCH_X86_64,
            libc::SYS_umask as u32,
            [value; 6],
        )
    };
    assert_eq!((umask(1), umask(2), umask(3)), (ALLOW, ALLOW, ERRNO | 1));
}

#[test]
fn refusals() {
    let bad_index = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["umask"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]});
    assert!(compile(&profile(bad_index)).is_err());
    let notify = json!({"defaultAction": "SCMP_ACT_NOTIFY"});
    assert!(compile(&profile(notify)).is_err());
}

fn operators() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(vec![
        "SCMP_CMP_NE",
        "SCMP_CMP_LT",
        "SCMP_CMP_LE",
        "SCMP_CMP_EQ",
        "SCMP_CMP_GE",
        "SCMP_CMP_GT",
        "SCMP_CMP_MASKED_EQ",
    ])
}

/// Values around the borders of the two halves.
fn values() -> impl Strategy<Value = u64> {
    let near =
        |base: u64| (0u64..3).prop_map(move |delta| base.wrapping_add(delta).wrapping_sub(1));
    prop_oneof![
        near(0),
        near(1 << 32),
        near(u64::from(u32::MAX) << 32),
        near(5 << 32 | 7),
        any::<u64>()
    ]
}

proptest! {
    #[test]
    fn every_comparison_is_a_64_bit_one(
        conditions in proptest::collection::vec((operators(), values(), values()), 1..4),
        arguments in proptest::array::uniform6(values()),
    ) {
        let args: Vec<_> = conditions.iter().enumerate().map(|(index, (op, value, two))| {
            json!({"index": index, "value": value, "valueTwo": two, "op": op})
        }).collect();
        let compiled = compile(&profile(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["prctl"], "action": "SCMP_ACT_ALLOW", "args": args}],
        }))).unwrap();
        let holds = conditions.iter().zip(arguments).all(|((op, value, two), argument)| match *op {
            "SCMP_CMP_NE" => argument != *value,
            "SCMP_CMP_LT" => argument < *value,
            "SCMP_CMP_LE" => argument <= *value,
            "SCMP_CMP_EQ" => argument == *value,
            "SCMP_CMP_GE" => argument >= *value,
            "SCMP_CMP_GT" => argument > *value,
            _ => argument & *value == *two,
        });
        let verdict = run(&compiled, AUDIT_ARCH_X86_64, libc::SYS_prctl as u32, arguments);
        prop_assert_eq!(verdict == ALLOW, holds);
    }
}
