//! Two layers, unpacked one upon the other as a pull unpacks them: nothing but their own directory changes.
#![no_main]

use std::{fs, path::Path, sync::OnceLock};

use husk_fuzz::{
    sandbox::{Sandbox, look_at},
    tarball::Tarball,
};
use husk_image::{
    apply::{ApplyError, Expected, apply},
    layer::{Limits, Sha256Digest},
    unpack::{Options, Owners},
};
use libfuzzer_sys::fuzz_target;

#[derive(arbitrary::Arbitrary, Debug)]
struct Image {
    lower: Tarball,
    upper: Tarball,
    for_a_user: bool,
}

fuzz_target!(|image: Image| {
    static SANDBOX: OnceLock<Sandbox<Image>> = OnceLock::new();
    SANDBOX.get_or_init(|| Sandbox::new(unpack)).give(image);
});

fn unpack(dir: &Path, image: Image) {
    let (lower, upper) = (dir.join("lower"), dir.join("upper"));
    fs::create_dir(&lower).unwrap();
    fs::create_dir(&upper).unwrap();
    let mut options = Options {
        owners: if image.for_a_user {
            Owners::Caller
        } else {
            Owners::Kept
        },
        lowers: &[],
        user_xattrs: image.for_a_user,
    };
    one(&image.lower, &lower, options);
    let lowers = [&*lower];
    let before = look_at(&lower);
    options.lowers = &lowers;
    one(&image.upper, &upper, options);
    assert_eq!(look_at(&lower), before, "it changed the layer below");
    let mut left: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["lower", "upper"]);
}

fn one(tarball: &Tarball, into: &Path, options: Options<'_>) {
    let blob = tarball.bytes();
    let digest = Sha256Digest::of(&blob);
    let expected = Expected {
        digest,
        size: blob.len() as u64,
        diff_id: digest,
    };
    match apply(&*blob, &expected, Limits::default(), into, options) {
        Ok(unpacked) => {
            assert!(unpacked.bytes <= expected.size);
            assert!(unpacked.entries <= expected.size / 512);
        }
        // They are its own.
        Err(error @ ApplyError::Mismatch { .. }) => panic!("{error}"),
        Err(error) => drop(error.to_string()),
    }
}
