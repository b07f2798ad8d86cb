//! What the fuzz targets share: tar archives that are mostly right, and a root of their own in which everything else is watched.

pub mod devices;
pub mod fuse;
pub mod guest;
pub mod model;
pub mod sandbox;
pub mod tarball;
