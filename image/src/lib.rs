//! Images: from a registry to a root file system.
//!
//! An image is hostile until it has been checked, and may be large. So a layer is one stream: it is digested, decompressed, digested again
//! and taken apart as it comes ([`layer`]), each step bounded, without a copy of it anywhere. [`archive`] reads tar, [`unpack`] makes what
//! it says in a directory that becomes a layer of an overlay; there the kernel resolves every path, below that directory. [`apply::apply`] is all of it, and [`store`] keeps
//! what came. [`manifest`] says which layers an image has, [`registry`] speaks with whoever has it,
//! [`signature`] whether somebody vouches for it, and [`pull::pull`] is all of that.

pub mod apply;
pub mod archive;
pub mod layer;
pub mod manifest;
pub mod name;
#[cfg(feature = "registry")]
pub mod pull;
#[cfg(feature = "registry")]
pub mod registry;
#[cfg(feature = "registry")]
pub mod signature;
pub mod store;
mod tree;
pub mod unpack;
