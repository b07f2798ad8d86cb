//! The compiler from an OCI seccomp profile to classic BPF.
//!
//! The program's shape: load the ABI, jump to its part; there, one block per system call number in the order of
//! the numbers. A block tries its conditional rules in the profile's order, then answers with its
//! unconditional rule, or with the default. Each comparison of a 64-bit argument takes its two halves. The kernel caches
//! the numbers that are always allowed, so that the linear search costs nothing for them.

use std::collections::BTreeMap;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator,
};

use super::super::error::LaunchError;
use super::super::sys::BpfInstruction;

/// AUDIT_ARCH_* of linux/audit.h.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// Set in the number of an x32 call, which has x86_64's audit value.
const X32_BIT: u32 = 0x4000_0000;
/// BPF_MAXINSNS: the kernel takes no longer program.
const MAX_INSTRUCTIONS: usize = 4096;
/// Offsets in struct seccomp_data.
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGUMENTS: u32 = 16;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_GREATER: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
const JUMP_GREATER_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;

const fn statement(code: u16, k: u32) -> BpfInstruction {
    BpfInstruction {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

const fn branch(code: u16, k: u32, jt: u8, jf: u8) -> BpfInstruction {
    BpfInstruction { code, jt, jf, k }
}

/// The rules of one system call.
#[derive(Debug, Default, Clone)]
struct Rules {
    /// All conditions of a rule must hold.
    conditional: Vec<(Vec<LinuxSeccompArg>, u32)>,
    unconditional: Option<u32>,
}

type Table = BTreeMap<u32, Rules>;

#[derive(Debug, Clone, Copy)]
enum Abi {
    X86_64,
    I386,
}

impl Abi {
    /// The number of a system call; `None` for a name that this ABI lacks.
    fn number(self, name: &str) -> Option<u32> {
        match self {
            Self::X86_64 => name
                .parse::<syscalls::x86_64::Sysno>()
                .ok()
                .map(|call| call.id().cast_unsigned()),
            Self::I386 => name
                .parse::<syscalls::x86::Sysno>()
                .ok()
                .map(|call| call.id().cast_unsigned()),
        }
    }

    fn audit_value(self) -> u32 {
        match self {
            Self::X86_64 => AUDIT_ARCH_X86_64,
            Self::I386 => AUDIT_ARCH_I386,
        }
    }
}

/// Compiles a profile for the native ABI and, where the profile lists it, i386.
pub(super) fn compile(profile: &LinuxSeccomp) -> Result<Vec<BpfInstruction>, LaunchError> {
    let default = return_value(profile.default_action(), profile.default_errno_ret())?;
    let mut abis = vec![Abi::X86_64];
    if profile
        .architectures()
        .iter()
        .flatten()
        .any(|arch| *arch == Arch::ScmpArchX86)
    {
        abis.push(Abi::I386);
    }
    let mut program = vec![statement(LOAD, OFFSET_ARCH)];
    for abi in abis {
        let part = abi_part(abi, profile, default)?;
        let length = u32::try_from(part.len()).unwrap_or(u32::MAX);
        program.push(branch(JUMP_EQUAL, abi.audit_value(), 1, 0));
        program.push(statement(JUMP, length));
        program.extend(part);
    }
    // An ABI that the profile does not know: libseccomp kills as well.
    program.push(statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS));
    if program.len() > MAX_INSTRUCTIONS {
        return Err(LaunchError::invalid(format!(
            "the seccomp profile compiles to {} instructions; the kernel takes {MAX_INSTRUCTIONS}",
            program.len()
        )));
    }
    Ok(program)
}

fn abi_part(
    abi: Abi,
    profile: &LinuxSeccomp,
    default: u32,
) -> Result<Vec<BpfInstruction>, LaunchError> {
    let table = table(abi, profile, default)?;
    let mut part = vec![statement(LOAD, OFFSET_NUMBER)];
    let no_such_call = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    if matches!(abi, Abi::X86_64) {
        // The guest's kernel has no x32, and its answer is this one.
        part.push(branch(JUMP_GREATER_EQUAL, X32_BIT, 0, 1));
        part.push(statement(RETURN, no_such_call));
    }
    // As runc: calls newer than the profile are "not there" rather than "forbidden", so that a C library
    // falls back to an older one.
    let newest = profile
        .syscalls()
        .iter()
        .flatten()
        .flat_map(|rule| rule.names())
        .filter_map(|name| abi.number(name))
        .max();
    if let Some(newest) = newest
        && default & libc::SECCOMP_RET_ACTION_FULL == libc::SECCOMP_RET_ERRNO
    {
        part.push(branch(JUMP_GREATER, newest, 0, 1));
        part.push(statement(RETURN, no_such_call));
    }
    for (number, rules) in &table {
        let block = rules_block(rules, default)?;
        // A block can be longer than a conditional jump reaches.
        part.push(branch(JUMP_EQUAL, *number, 1, 0));
        part.push(statement(
            JUMP,
            u32::try_from(block.len()).unwrap_or(u32::MAX),
        ));
        part.extend(block);
    }
    part.push(statement(RETURN, default));
    Ok(part)
}

/// Sorts the profile's rules by number. Names that the ABI lacks are left out, as runc does.
fn table(abi: Abi, profile: &LinuxSeccomp, default: u32) -> Result<Table, LaunchError> {
    let mut table = Table::new();
    for rule in profile.syscalls().iter().flatten() {
        let action = return_value(rule.action(), rule.errno_ret())?;
        if action == default {
            // libseccomp has no such rules: they say nothing.
            continue;
        }
        let conditions = rule.args().as_deref().unwrap_or_default();
        if let Some(bad) = conditions.iter().find(|condition| condition.index() > 5) {
            return Err(LaunchError::invalid(format!(
                "seccomp: a system call has no argument {}",
                bad.index()
            )));
        }
        for number in rule.names().iter().filter_map(|name| abi.number(name)) {
            let rules = table.entry(number).or_default();
            if conditions.is_empty() {
                rules.unconditional.get_or_insert(action);
            } else if names_an_argument_twice(conditions) {
                // libseccomp cannot express both in one rule; runc then means any of them.
                rules
                    .conditional
                    .extend(conditions.iter().map(|one| (vec![*one], action)));
            } else {
                rules.conditional.push((conditions.to_vec(), action));
            }
        }
    }
    Ok(table)
}

fn names_an_argument_twice(conditions: &[LinuxSeccompArg]) -> bool {
    let mut seen = 0u64;
    conditions.iter().any(|condition| {
        let bit = 1 << condition.index();
        let again = seen & bit != 0;
        seen |= bit;
        again
    })
}

/// Ends in a return on every path.
fn rules_block(rules: &Rules, default: u32) -> Result<Vec<BpfInstruction>, LaunchError> {
    let mut block = Vec::new();
    for (conditions, action) in &rules.conditional {
        let mut body: Vec<Test> = conditions.iter().flat_map(condition).collect();
        body.push(Test::Plain(statement(RETURN, *action)));
        block.extend(link(&body)?);
    }
    block.push(statement(RETURN, rules.unconditional.unwrap_or(default)));
    Ok(block)
}

/// An instruction of a rule whose jumps are not numbers yet.
#[derive(Clone, Copy)]
enum Test {
    Plain(BpfInstruction),
    /// Goes on where the comparison has this outcome, fails the rule otherwise.
    Require {
        code: u16,
        k: u32,
        outcome: bool,
    },
    /// Skips this many instructions where the comparison holds (it settles the condition).
    HoldsSkip {
        code: u16,
        k: u32,
        skip: u8,
    },
}

/// Fills in the jumps: a failed rule goes to just behind it.
fn link(body: &[Test]) -> Result<Vec<BpfInstruction>, LaunchError> {
    body.iter()
        .enumerate()
        .map(|(position, test)| {
            let fail = u8::try_from(body.len() - position - 1)
                .map_err(|_| LaunchError::invalid("a seccomp rule has too many conditions"))?;
            Ok(match *test {
                Test::Plain(instruction) => instruction,
                Test::Require {
                    code,
                    k,
                    outcome: true,
                } => branch(code, k, 0, fail),
                Test::Require {
                    code,
                    k,
                    outcome: false,
                } => branch(code, k, fail, 0),
                Test::HoldsSkip { code, k, skip } => branch(code, k, skip, 0),
            })
        })
        .collect()
}

/// One condition on a 64-bit argument, by its halves: seccomp_data is little-endian on x86.
fn condition(argument: &LinuxSeccompArg) -> Vec<Test> {
    let index = u32::try_from(argument.index()).unwrap_or(0);
    let low = OFFSET_ARGUMENTS + 8 * index;
    let load = |offset| Test::Plain(statement(LOAD, offset));
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    let (high_value, low_value) = halves(argument.value());
    let require = |code, k, outcome| Test::Require { code, k, outcome };
    let skip = |code, k, skip| Test::HoldsSkip { code, k, skip };
    match argument.op() {
        LinuxSeccompOperator::ScmpCmpEq => vec![
            load(low + 4),
            require(JUMP_EQUAL, high_value, true),
            load(low),
            require(JUMP_EQUAL, low_value, true),
        ],
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            // value is the mask, valueTwo what remains.
            let (high_wanted, low_wanted) = halves(argument.value_two().unwrap_or(0));
            let and = |mask| Test::Plain(statement(AND, mask));
            vec![
                load(low + 4),
                and(high_value),
                require(JUMP_EQUAL, high_wanted, true),
                load(low),
                and(low_value),
                require(JUMP_EQUAL, low_wanted, true),
            ]
        }
        LinuxSeccompOperator::ScmpCmpNe => vec![
            load(low + 4),
            // High halves equal: the low ones decide. Otherwise it holds.
            skip(JUMP_EQUAL, high_value, 1),
            Test::Plain(statement(JUMP, 2)),
            load(low),
            require(JUMP_EQUAL, low_value, false),
        ],
        LinuxSeccompOperator::ScmpCmpGt | LinuxSeccompOperator::ScmpCmpGe => {
            let decide = if argument.op() == LinuxSeccompOperator::ScmpCmpGt {
                JUMP_GREATER
            } else {
                JUMP_GREATER_EQUAL
            };
            vec![
                load(low + 4),
                skip(JUMP_GREATER, high_value, 3),
                require(JUMP_EQUAL, high_value, true),
                load(low),
                require(decide, low_value, true),
            ]
        }
        LinuxSeccompOperator::ScmpCmpLt | LinuxSeccompOperator::ScmpCmpLe => {
            let exceeds = if argument.op() == LinuxSeccompOperator::ScmpCmpLt {
                JUMP_GREATER_EQUAL
            } else {
                JUMP_GREATER
            };
            vec![
                load(low + 4),
                require(JUMP_GREATER, high_value, false),
                // Smaller: it holds.
                skip(JUMP_EQUAL, high_value, 1),
                Test::Plain(statement(JUMP, 2)),
                load(low),
                require(exceeds, low_value, false),
            ]
        }
    }
}

/// SECCOMP_RET_* for an action.
fn return_value(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, LaunchError> {
    let data = |value: u32| value & libc::SECCOMP_RET_DATA;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            libc::SECCOMP_RET_KILL_THREAD
        }
        LinuxSeccompAction::ScmpActKillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        LinuxSeccompAction::ScmpActTrap => libc::SECCOMP_RET_TRAP,
        LinuxSeccompAction::ScmpActErrno => {
            libc::SECCOMP_RET_ERRNO | data(errno.unwrap_or(libc::EPERM as u32))
        }
        LinuxSeccompAction::ScmpActTrace => {
            libc::SECCOMP_RET_TRACE | data(errno.unwrap_or(libc::EPERM as u32))
        }
        LinuxSeccompAction::ScmpActLog => libc::SECCOMP_RET_LOG,
        LinuxSeccompAction::ScmpActAllow => libc::SECCOMP_RET_ALLOW,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(LaunchError::invalid(
                "seccomp action SCMP_ACT_NOTIFY is not supported",
            ));
        }
    })
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
