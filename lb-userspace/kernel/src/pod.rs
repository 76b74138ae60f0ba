//! aya's marker trait for the layouts of `lb_common`.

use lb_common::layout::MapValue;

/// A map key or value for aya. A newtype, since both the trait and the type are foreign to this crate.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Plain<T>(pub(super) T);

#[expect(
    unsafe_code,
    reason = "the promise is MapValue's, checked at compile time where each layout is declared"
)]
// SAFETY: `MapValue` promises what `Pod` asks for: every bit pattern is valid and there is no padding.
unsafe impl<T: MapValue> aya::Pod for Plain<T> {}
