//! Where a start's time went: the `husk.timing` lines that the shim leaves in containerd's log.

use std::collections::BTreeMap;

use serde_json::Value;

/// Phases of one start by name, in milliseconds.
pub type Phases = BTreeMap<String, f64>;

/// The phases in the order in which they happen, with what each one covers.
pub const PHASES: [(&str, &str); 5] = [
    ("shim_start", "shim process to VM asked for"),
    ("vm_ready", "VM asked for to vCPUs running"),
    ("kernel_to_agent", "kernel entry to agent connected"),
    ("agent_to_process", "agent connected to process running"),
    ("exit_to_reaped", "process exit to task deleted"),
];

/// Every phase that a log tells of container `id`, over all its lines.
pub fn phases(log: &str, id: &str) -> Phases {
    let mut all = Phases::new();
    for object in log.lines().filter_map(timing_object) {
        if object.get("id").and_then(Value::as_str) == Some(id) {
            for (name, value) in object.as_object().into_iter().flatten() {
                if let Some(ms) = value.as_f64() {
                    all.insert(name.clone(), ms);
                }
            }
        }
    }
    all
}

/// The JSON object behind `husk.timing`, as it stands or as containerd has quoted it.
fn timing_object(line: &str) -> Option<Value> {
    let rest = line.split_once("husk.timing ")?.1;
    let parse = |text: &str| {
        serde_json::Deserializer::from_str(text)
            .into_iter::<Value>()
            .next()?
            .ok()
    };
    parse(rest).or_else(|| parse(&rest.replace("\\\"", "\"")))
}

/// The median; `None` of nothing.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    match sorted.len() % 2 {
        1 => Some(upper),
        _ => Some((upper + sorted.get(middle - 1)?) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_plain_and_quoted_lines_of_one_container() {
        let log = r#"level=info msg="husk.timing {\"id\":\"a\",\"vm_ready\":12.5}"
time=x husk.timing {"id":"a","shim_start":3} id=a
husk.timing {"id":"b","vm_ready":99}
husk.timing {broken
"#;
        let found = phases(log, "a");
        assert_eq!(found.get("vm_ready"), Some(&12.5));
        assert_eq!(found.get("shim_start"), Some(&3.0));
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn median_of_even_odd_and_none() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
