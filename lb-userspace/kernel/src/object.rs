//! The compiled BPF object, embedded in the binary.

use super::KernelError;

/// Forces the alignment that an ELF parser needs.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/socklb.bpf.o")));

/// The object's bytes.
///
/// # Errors
///
/// [`KernelError::NoObject`] if this binary was built without one.
pub fn bytes() -> Result<&'static [u8], KernelError> {
    if OBJECT.0.is_empty() { Err(KernelError::NoObject) } else { Ok(&OBJECT.0) }
}
