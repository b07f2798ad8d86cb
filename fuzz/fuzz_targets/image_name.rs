//! What people write: names of images, digests, platforms. What is read prints as something that reads as the same.
#![no_main]

use std::{
    fmt::{Debug, Display},
    str::FromStr,
};

use husk_image::{layer::Sha256Digest, manifest::Platform, name::ImageName};
use libfuzzer_sys::fuzz_target;

fn comes_back<T: FromStr + Display + PartialEq + Debug>(text: &str) -> Option<T>
where
    T::Err: Display + Debug,
{
    match text.parse::<T>() {
        Ok(read) => {
            assert_eq!(read.to_string().parse::<T>().unwrap(), read);
            Some(read)
        }
        Err(error) => {
            let _ = error.to_string();
            None
        }
    }
}

fuzz_target!(|text: &str| {
    comes_back::<Sha256Digest>(text);
    comes_back::<Platform>(text);
    if let Some(name) = comes_back::<ImageName>(text) {
        let whole = name.to_string();
        assert!(whole.starts_with(&format!("{}/{}", name.registry(), name.repository())));
        // They become parts of a URL.
        let is_sound = |byte: u8| byte.is_ascii_alphanumeric() || b":/@._-[]".contains(&byte);
        assert!(whole.bytes().all(is_sound), "{whole}");
        assert!(
            name.repository()
                .split('/')
                .all(|part| !part.is_empty() && part != "." && part != "..")
        );
        assert_eq!(name.digest().is_some(), whole.contains('@'));
    }
});
