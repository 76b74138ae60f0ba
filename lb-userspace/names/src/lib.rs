//! The node's name server: DNS messages in, answers out.
//!
//! [`lb_core::names`] decides what is answered; this crate has the sockets, the messages, the cache and the
//! upstream servers.
