//! Files that the engine leaves to the sandbox, put among a container's mounts.

use std::path::Path;

use serde_json::{Value, json};

use super::{BundleSpec, Mount};

impl BundleSpec {
    /// Gives the container a file of its pod, unless the engine has given it one. CRI leaves such a file to the sandbox by naming no
    /// mount for it, or (containerd 1.7) one of a directory that it has made for want of a file.
    pub fn bind_file(&mut self, destination: &str, source: &Path) {
        let place = |path: &str| Path::new("/").join(path);
        let mounts = self.read.mounts.get_or_insert_default();
        let index = mounts
            .iter()
            .position(|mount| place(&mount.destination) == place(destination));
        let given = index.and_then(|index| mounts.get(index)?.source.as_deref());
        if given.is_some_and(|given| !self.bundle.join(given).is_dir()) {
            return;
        }
        let read_only = self.value.pointer("/root/readonly") == Some(&Value::Bool(true));
        let options = ["rbind", "rprivate", if read_only { "ro" } else { "rw" }];
        let json = json!({"destination": destination, "type": "bind", "source": source, "options": options});
        let mount = Mount {
            destination: destination.to_owned(),
            kind: Some("bind".to_owned()),
            source: Some(source.to_owned()),
            options: Some(options.map(str::to_owned).into()),
            ..Mount::default()
        };
        let Some(spec) = self.value.as_object_mut() else {
            return;
        };
        let list = spec.entry("mounts").or_insert(Value::Null);
        if list.is_null() {
            *list = json!([]);
        }
        let Some(list) = list.as_array_mut() else {
            return;
        };
        match index.and_then(|index| Some((mounts.get_mut(index)?, list.get_mut(index)?))) {
            Some((old, old_json)) => (*old, *old_json) = (mount, json),
            None => {
                mounts.push(mount);
                list.push(json);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_hosts(json: Value) -> BundleSpec {
        let json = serde_json::to_vec(&json).unwrap();
        let mut spec = BundleSpec::parse(Path::new("/b"), &json).unwrap();
        spec.bind_file("/etc/hosts", Path::new("/pod/hosts"));
        // What the shim mounts and what the agent is told are the same list.
        let list = spec.value["mounts"].as_array().unwrap();
        let read = spec.read.mounts.as_deref().unwrap();
        assert_eq!(list.len(), read.len());
        for (json, mount) in list.iter().zip(read) {
            assert_eq!(json["destination"], mount.destination);
            assert_eq!(
                json["source"].as_str().map(Path::new),
                mount.source.as_deref()
            );
        }
        spec
    }

    #[test]
    fn a_file_is_added_where_the_engine_gives_none() {
        for mounts in [
            json!(null),
            json!([]),
            json!([{"destination": "/proc", "type": "proc", "source": "proc"}]),
        ] {
            let count = mounts.as_array().map_or(0, Vec::len);
            let spec = with_hosts(json!({"root": {"path": "r"}, "mounts": mounts}));
            let binds = spec.bind_mounts();
            let [bind] = binds.as_slice() else {
                panic!("{binds:?}");
            };
            assert_eq!(
                (bind.index, bind.source.as_path()),
                (count, Path::new("/pod/hosts"))
            );
            assert!(!bind.read_only);
        }
        let read_only = with_hosts(json!({"root": {"path": "r", "readonly": true}}));
        assert!(read_only.bind_mounts().iter().all(|bind| bind.read_only));
        assert_eq!(read_only.bind_mounts().len(), 1);
    }

    #[test]
    fn the_engines_own_file_stays_and_its_directory_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hosts");
        std::fs::write(&file, "").unwrap();
        let source = |source: &Path| {
            let mount = json!({"destination": "/etc/hosts/", "type": "bind", "source": source, "options": ["rbind"]});
            let spec = with_hosts(json!({"root": {"path": "r"}, "mounts": [mount]}));
            let binds = spec.bind_mounts();
            assert_eq!(binds.len(), 1);
            binds[0].source.clone()
        };
        assert_eq!(source(&file), file);
        assert_eq!(source(dir.path()), Path::new("/pod/hosts"));
        // What is missing is for the mount to tell.
        let missing = dir.path().join("missing");
        assert_eq!(source(&missing), missing);
    }
}
