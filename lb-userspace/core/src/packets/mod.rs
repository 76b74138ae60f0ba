//! What reaches no hook is served as packets, by nftables.
//!
//! [`nft`] has the objects of `nf_tables` as values.

pub mod nft;
