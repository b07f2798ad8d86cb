//! husk's settings: the node's, and those that an engine names for one of its runtimes.

use std::path::Path;

use toml::Table;

use super::{Finding, Verdict, files, finding};

const CHECK: &str = "husk's settings";
/// Every key there is, with a value of its type; the shim's tests see to that.
const EXAMPLE: &str = include_str!("../../../deploy/config.toml");
const NODE: &str = "/etc/husk/config.toml";

/// Of the node's, where it has any.
pub(super) fn findings(root: &Path) -> Option<Finding> {
    match check(root, Path::new(NODE)) {
        Ok(false) => None,
        Ok(true) => Some(finding(CHECK, Verdict::Ok, NODE, "")),
        Err(error) => Some(finding(
            CHECK,
            Verdict::Failure,
            error,
            "no pod starts with them; deploy/config.toml of husk's sources shows every key",
        )),
    }
}

/// Whether a file of settings is there. The error says what is wrong with it.
pub(super) fn check(root: &Path, path: &Path) -> Result<bool, String> {
    let Some(table) = files::table(root, path)? else {
        return Ok(false);
    };
    let known = known();
    for (key, value) in &table {
        match known.get(key) {
            None => {
                return Err(format!(
                    "{} has a key {key}, which husk does not know",
                    path.display()
                ));
            }
            Some(example) if !example.same_type(value) => {
                return Err(format!(
                    "{}: {key} is of the type {}, not {}",
                    path.display(),
                    value.type_str(),
                    example.type_str()
                ));
            }
            Some(_) => {}
        }
    }
    Ok(true)
}

/// The example with its settings not commented out: they are those without a space after the "#".
fn known() -> Table {
    let lines = EXAMPLE.lines().map(|line| {
        let setting = line
            .strip_prefix('#')
            .filter(|rest| rest.starts_with(|first: char| first.is_ascii_lowercase()));
        setting.unwrap_or(line)
    });
    let text: Vec<&str> = lines.collect();
    text.join("\n").parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn said(text: &str) -> Option<Finding> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("etc/husk")).unwrap();
        fs::write(dir.path().join("etc/husk/config.toml"), text).unwrap();
        findings(dir.path())
    }

    #[test]
    fn settings_are_known_by_the_example() {
        assert!(known().len() > 12, "{:?}", known());
        assert!(findings(tempfile::tempdir().unwrap().path()).is_none());
        let every = toml::to_string(&known()).unwrap();
        for text in [EXAMPLE, &every, "default_memory_mib = 300\n"] {
            assert_eq!(said(text).unwrap().verdict, Verdict::Ok, "{text}");
        }
        for (text, part) in [
            ("default_memory = 300\n", "key default_memory,"),
            (
                "default_memory_mib = 'much'\n",
                "is of the type string, not integer",
            ),
            ("\n[cache\n", "config.toml, line 2"),
        ] {
            let finding = said(text).unwrap();
            assert_eq!(finding.verdict, Verdict::Failure);
            assert!(finding.found.contains(part), "{finding:?}");
        }
    }
}
