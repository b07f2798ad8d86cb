//! Which devices a container may use: an eBPF program on its cgroup.
//!
//! cgroup v2 has no file for this; the kernel asks a program at every open and mknod. The spec's list of rules is
//! v1's, where a later rule overrides an earlier one for the accesses it names. So the program walks the list from its end,
//! and crosses off what has been allowed of the access that was asked for: nothing left means yes, a
//! rule that denies any of the rest means no, and so does the list's end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::container::sys::{bpf_attach, bpf_load};

/// BPF_PROG_TYPE_CGROUP_DEVICE and BPF_CGROUP_DEVICE of linux/bpf.h.
const PROGRAM_TYPE: u32 = 15;
const ATTACH_TYPE: u32 = 6;

/// BPF_DEVCG_ACC_* of linux/bpf.h.
mod access {
    pub(super) const MKNOD: u8 = 1;
    pub(super) const READ: u8 = 2;
    pub(super) const WRITE: u8 = 4;
    pub(super) const ALL: u8 = MKNOD | READ | WRITE;
}

/// BPF_DEVCG_DEV_* of linux/bpf.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Block = 1,
    Char = 2,
}

/// One rule; `None` is any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<Kind>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u8,
}

/// What every container may use, as runc has it: making any node, and the devices of [`crate::container`]'s
/// /dev with its terminals.
const DEFAULT_RULES: [Rule; 10] = [
    allow(Kind::Char, None, None, access::MKNOD),
    allow(Kind::Block, None, None, access::MKNOD),
    allow(Kind::Char, Some(1), Some(3), access::ALL),
    allow(Kind::Char, Some(1), Some(5), access::ALL),
    allow(Kind::Char, Some(1), Some(7), access::ALL),
    allow(Kind::Char, Some(1), Some(8), access::ALL),
    allow(Kind::Char, Some(1), Some(9), access::ALL),
    allow(Kind::Char, Some(5), Some(0), access::ALL),
    allow(Kind::Char, Some(5), Some(2), access::ALL),
    allow(Kind::Char, Some(136), None, access::ALL),
];

const fn allow(kind: Kind, major: Option<u32>, minor: Option<u32>, access: u8) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }
}

impl Rule {
    /// `None` for a FIFO's rule: the kernel asks about no FIFO.
    fn from_spec(rule: &LinuxDeviceCgroup) -> Option<Self> {
        // -1 is how some callers write "any".
        let number = |value: Option<i64>| value.and_then(|value| u32::try_from(value).ok());
        let kind = match rule.typ() {
            Some(LinuxDeviceType::B) => Some(Kind::Block),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(Kind::Char),
            Some(LinuxDeviceType::P) => return None,
            // A rule for all devices has no numbers.
            Some(LinuxDeviceType::A) | None => {
                return Some(Self {
                    allow: rule.allow(),
                    kind: None,
                    major: None,
                    minor: None,
                    access: access::ALL,
                });
            }
        };
        let bits = rule.access().as_deref().unwrap_or("rwm");
        let access = bits.bytes().fold(0, |bits, letter| {
            bits | match letter {
                b'r' => access::READ,
                b'w' => access::WRITE,
                b'm' => access::MKNOD,
                _ => 0,
            }
        });
        Some(Self {
            allow: rule.allow(),
            kind,
            major: number(rule.major()),
            minor: number(rule.minor()),
            access,
        })
    }

    /// Decides about every device and access.
    fn is_final(&self) -> bool {
        self.kind.is_none()
            && self.major.is_none()
            && self.minor.is_none()
            && self.access == access::ALL
    }
}

/// Limits a cgroup to the devices of the rules and the defaults, in the place of an earlier program.
pub(super) fn attach(
    cgroup: &Path,
    rules: &[LinuxDeviceCgroup],
    replaced: Option<&OwnedFd>,
) -> io::Result<OwnedFd> {
    let rules: Vec<Rule> = rules
        .iter()
        .filter_map(Rule::from_spec)
        .chain(DEFAULT_RULES)
        .collect();
    let program = bpf_load(PROGRAM_TYPE, ATTACH_TYPE, &assemble(&rules))?;
    let directory = File::open(cgroup)?;
    bpf_attach(
        directory.as_fd(),
        program.as_fd(),
        ATTACH_TYPE,
        replaced.map(AsFd::as_fd),
    )?;
    Ok(program)
}

/// eBPF's registers, by what they hold here.
#[derive(Debug, Clone, Copy)]
enum Register {
    /// The answer.
    R0 = 0,
    /// The context, `struct bpf_cgroup_dev_ctx`; then the minor.
    R1 = 1,
    /// The kind of device.
    R2 = 2,
    /// What of the access is still undecided.
    R3 = 3,
    /// The major.
    R4 = 4,
}

use Register::{R0, R1, R2, R3, R4};

// Operation codes of linux/bpf_common.h and linux/bpf.h: class | source or size | operation.
/// r = *(u32 *)(r + offset)
const LOAD_WORD: u8 = 0x61;
/// r = immediate
const MOVE: u8 = 0xb7;
/// r = r
const MOVE_REGISTER: u8 = 0xbf;
/// r &= immediate
const AND: u8 = 0x57;
/// r >>= immediate
const SHIFT_RIGHT: u8 = 0x77;
/// goto
const GOTO: u8 = 0x05;
/// if r != immediate goto
const IF_NOT_EQUAL: u8 = 0x55;
/// if r & immediate goto
const IF_SET: u8 = 0x45;
const EXIT: u8 = 0x95;

/// One instruction as the kernel's eight bytes.
fn encode(code: u8, to: Register, from: Register, offset: i16, immediate: i32) -> u64 {
    u64::from(code)
        | (to as u64) << 8
        | (from as u64) << 12
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(immediate.cast_unsigned()) << 32
}

fn simple(code: u8, to: Register, immediate: i32) -> u64 {
    encode(code, to, R0, 0, immediate)
}

fn answer(allowed: bool) -> [u64; 2] {
    [simple(MOVE, R0, i32::from(allowed)), simple(EXIT, R0, 0)]
}

/// Turns rules into a program.
fn assemble(rules: &[Rule]) -> Vec<u64> {
    let mut program = vec![
        // access_type: the access in the upper half, the kind in the lower.
        encode(LOAD_WORD, R2, R1, 0, 0),
        encode(MOVE_REGISTER, R3, R2, 0, 0),
        simple(AND, R2, 0xffff),
        simple(SHIFT_RIGHT, R3, 16),
        encode(LOAD_WORD, R4, R1, 4, 0),
        encode(LOAD_WORD, R1, R1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        if rule.is_final() {
            // The verifier refuses instructions that nothing reaches.
            program.extend(answer(rule.allow));
            return program;
        }
        program.extend(rule_block(rule));
    }
    program.extend(answer(false));
    program
}

/// Falls through where the rule does not decide.
fn rule_block(rule: &Rule) -> Vec<u64> {
    let tests = [
        (R2, rule.kind.map(|kind| kind as u32)),
        (R4, rule.major),
        (R1, rule.minor),
    ];
    let access = i32::from(rule.access);
    let mut action = if rule.allow {
        vec![simple(AND, R3, !access), encode(IF_NOT_EQUAL, R3, R0, 2, 0)]
    } else {
        vec![
            encode(IF_SET, R3, R0, 1, access),
            encode(GOTO, R0, R0, 2, 0),
        ]
    };
    action.extend(answer(rule.allow));
    let tests: Vec<(Register, u32)> = tests
        .into_iter()
        .filter_map(|(register, wanted)| Some((register, wanted?)))
        .collect();
    let mut block = Vec::new();
    for (position, (register, wanted)) in tests.iter().enumerate() {
        // At most two more tests and four instructions of the action.
        let skip = (tests.len() - position - 1 + action.len()) as i16;
        block.push(encode(
            IF_NOT_EQUAL,
            *register,
            R0,
            skip,
            wanted.cast_signed(),
        ));
    }
    block.extend(action);
    block
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs a program on an access, as the kernel would.
    fn run(program: &[u64], kind: Kind, access: u8, major: u32, minor: u32) -> bool {
        let context = [u32::from(access) << 16 | kind as u32, major, minor];
        let mut registers = [0u64; 11];
        let mut position = 0usize;
        loop {
            let word = program[position];
            let (code, to, from) = (
                word as u8,
                (word >> 8 & 15) as usize,
                (word >> 12 & 15) as usize,
            );
            let (offset, immediate) = ((word >> 16) as i16, (word >> 32) as i32);
            let wide = i64::from(immediate).cast_unsigned();
            position += 1;
            let mut jump = |holds: bool| {
                if holds {
                    position = position.checked_add_signed(offset.into()).unwrap();
                }
            };
            match code {
                LOAD_WORD => {
                    assert_eq!(from, 1, "only the context is memory");
                    registers[to] = context[offset as usize / 4].into();
                }
                MOVE => registers[to] = wide,
                MOVE_REGISTER => registers[to] = registers[from],
                AND => registers[to] &= wide,
                SHIFT_RIGHT => registers[to] >>= wide,
                GOTO => jump(true),
                IF_NOT_EQUAL => jump(registers[to] != wide),
                IF_SET => jump(registers[to] & wide != 0),
                EXIT => return registers[0] == 1,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    /// The rules' meaning, said plainly: each access by itself, the last rule that speaks of it.
    fn allowed(rules: &[Rule], kind: Kind, asked: u8, major: u32, minor: u32) -> bool {
        [access::MKNOD, access::READ, access::WRITE]
            .into_iter()
            .filter(|bit| asked & bit != 0)
            .all(|bit| {
                rules
                    .iter()
                    .rev()
                    .find(|rule| {
                        rule.access & bit != 0
                            && rule.kind.is_none_or(|k| k == kind)
                            && rule.major.is_none_or(|m| m == major)
                            && rule.minor.is_none_or(|m| m == minor)
                    })
                    .is_some_and(|rule| rule.allow)
            })
    }

    fn rules(json: &str) -> Vec<Rule> {
        let list: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        list.iter()
            .filter_map(Rule::from_spec)
            .chain(DEFAULT_RULES)
            .collect()
    }

    #[test]
    fn containerds_default() {
        let list = rules(
            r#"[{"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
                {"allow": true, "type": "b", "major": 8, "minor": -1, "access": "r"}]"#,
        );
        let program = assemble(&list);
        let rw = access::READ | access::WRITE;
        assert!(run(&program, Kind::Char, rw, 1, 3));
        assert!(run(&program, Kind::Char, rw, 136, 7));
        assert!(run(&program, Kind::Char, rw, 10, 229));
        assert!(run(&program, Kind::Char, access::MKNOD, 99, 99));
        assert!(run(&program, Kind::Block, access::READ, 8, 3));
        assert!(!run(&program, Kind::Block, rw, 8, 3));
        assert!(!run(&program, Kind::Char, access::READ, 1, 1));
        assert!(!run(&program, Kind::Block, access::READ, 1, 3));
    }

    #[test]
    fn privileged_and_empty() {
        let all = assemble(&rules(r#"[{"allow": true, "access": "rwm"}]"#));
        assert!(run(&all, Kind::Block, access::ALL, 254, 1));
        let none = assemble(&rules("[]"));
        assert!(!run(&none, Kind::Block, access::READ, 254, 1));
        assert!(run(&none, Kind::Char, access::ALL, 1, 5));
    }

    #[test]
    fn a_rule_for_a_fifo_says_nothing_about_devices() {
        let list = rules(
            r#"[{"allow": false, "access": "rwm"},
                {"allow": true, "type": "p", "access": "rwm"}]"#,
        );
        let program = assemble(&list);
        assert!(!run(&program, Kind::Block, access::READ, 8, 0));
        assert!(run(&program, Kind::Char, access::ALL, 1, 3));
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let number = || proptest::option::of(0u32..3);
        let kind = proptest::option::of(proptest::sample::select(vec![Kind::Block, Kind::Char]));
        (any::<bool>(), kind, number(), number(), 0u8..8).prop_map(
            |(allow, kind, major, minor, access)| Rule {
                allow,
                kind,
                major,
                minor,
                access,
            },
        )
    }

    proptest! {
        #[test]
        fn programs_mean_what_their_rules_say(
            rules in proptest::collection::vec(any_rule(), 0..8),
            kind in proptest::sample::select(vec![Kind::Block, Kind::Char]),
            asked in 1u8..8,
            (major, minor) in (0u32..3, 0u32..3),
        ) {
            prop_assert_eq!(
                run(&assemble(&rules), kind, asked, major, minor),
                allowed(&rules, kind, asked, major, minor)
            );
        }

        #[test]
        fn the_verifier_takes_them(rules in proptest::collection::vec(any_rule(), 0..8)) {
            // Loading needs CAP_BPF; the tests run as root.
            prop_assert!(bpf_load(PROGRAM_TYPE, ATTACH_TYPE, &assemble(&rules)).is_ok());
        }
    }
}
