//! Messages of netfilter's netlink family, and a socket for them: `linux/netfilter/nfnetlink.h`.

use std::io;

use lb_core::packets::nft::Family;
use netlink_packet_core::{
    NLA_F_NESTED, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::{
    libc,
    sys::socket::{setsockopt, sockopt},
};

/// Octets of `nlmsghdr`.
const HEADER: usize = 16;
/// Octets of `nfgenmsg`, between the header and the attributes.
const GENERIC: usize = 4;
/// Octets of an attribute's header.
const ATTRIBUTE: usize = 4;
/// Octets of a buffer to receive: the kernel fills up to 32 KiB at once.
const RECEIVED: usize = 64 << 10;

/// The number of a family in messages: `NFPROTO_*`.
pub(super) const fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// The beginning of every message: what it is, and for which family (`NFPROTO_*`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    /// Subsystem and message.
    pub(super) kind: u16,
    /// `NLM_F_*`
    pub(super) flags: u16,
    /// `nfgen_family`
    pub(super) family: u8,
    /// `res_id`
    pub(super) resource: u16,
}

/// Writes messages.
#[derive(Debug, Default)]
pub(super) struct Writer {
    octets: Vec<u8>,
    /// An attribute did not fit: its length has 16 bits.
    is_too_long: bool,
}

impl Writer {
    /// How much is written.
    pub(super) fn len(&self) -> usize {
        self.octets.len()
    }

    /// The messages.
    ///
    /// # Errors
    ///
    /// `EMSGSIZE` if an attribute was longer than 65,535 octets.
    pub(super) fn finish(self) -> io::Result<Vec<u8>> {
        if self.is_too_long { Err(io::Error::from_raw_os_error(libc::EMSGSIZE)) } else { Ok(self.octets) }
    }

    /// Forgets what is written behind `len`.
    pub(super) fn truncate(&mut self, len: usize) {
        self.octets.truncate(len);
    }

    /// Adds flags to the message that begins at an octet.
    pub(super) fn add_flags(&mut self, start: usize, flags: u16) {
        // The third field of `nlmsghdr`.
        for (octet, more) in self.octets[start + 6..start + 8].iter_mut().zip(flags.to_ne_bytes()) {
            *octet |= more;
        }
    }

    /// Writes a message.
    pub(super) fn message(&mut self, head: Head, sequence: u32, body: impl FnOnce(&mut Self)) {
        let start = self.len();
        self.octets.extend([0; 4]);
        self.octets.extend(head.kind.to_ne_bytes());
        self.octets.extend(head.flags.to_ne_bytes());
        self.octets.extend(sequence.to_ne_bytes());
        self.octets.extend([0; 4]);
        self.octets.extend([head.family, 0]);
        self.octets.extend(head.resource.to_be_bytes());
        body(self);
        // Messages of a batch are far below 4 GiB: each list has 65,535 octets.
        let len = u32::try_from(self.len() - start).unwrap_or(u32::MAX);
        self.octets[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }

    /// Writes an attribute.
    pub(super) fn octets(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |writer| writer.octets.extend(value));
    }

    /// Writes an attribute in network order.
    pub(super) fn be32(&mut self, kind: u16, value: u32) {
        self.octets(kind, &value.to_be_bytes());
    }

    /// Writes an attribute in network order.
    pub(super) fn be64(&mut self, kind: u16, value: u64) {
        self.octets(kind, &value.to_be_bytes());
    }

    /// Writes a text with its terminator.
    pub(super) fn text(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |writer| {
            writer.octets.extend(value.as_bytes());
            writer.octets.push(0);
        });
    }

    /// Writes an attribute of attributes.
    pub(super) fn nested<R>(&mut self, kind: u16, body: impl FnOnce(&mut Self) -> R) -> R {
        self.attribute(kind | NLA_F_NESTED, body)
    }

    fn attribute<R>(&mut self, kind: u16, body: impl FnOnce(&mut Self) -> R) -> R {
        let start = self.len();
        self.octets.extend([0; 2]);
        self.octets.extend(kind.to_ne_bytes());
        let result = body(self);
        let len = u16::try_from(self.len() - start).unwrap_or_else(|_too_long| {
            self.is_too_long = true;
            0
        });
        self.octets[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self.octets.resize(self.len().next_multiple_of(4), 0);
        result
    }
}

/// Attributes in a row. What is malformed ends them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes<'a>(pub(super) &'a [u8]);

impl<'a> Attributes<'a> {
    /// Each with its type.
    pub(super) fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        NlasIterator::new(self.0).map_while(Result::ok).map(|attribute| {
            let (kind, len) = (attribute.kind(), usize::from(attribute.length()));
            (kind, attribute.into_inner().get(ATTRIBUTE..len).unwrap_or_default())
        })
    }

    /// The first of a type.
    pub(super) fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.iter().find_map(|(other, value)| (other == kind).then_some(value))
    }

    /// The attributes in one.
    pub(super) fn nested(self, kind: u16) -> Option<Self> {
        self.get(kind).map(Self)
    }

    /// A number in network order, of four octets.
    pub(super) fn be32(self, kind: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    /// A number in network order, of eight octets.
    pub(super) fn be64(self, kind: u16) -> Option<u64> {
        Some(u64::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    /// A number of one octet.
    pub(super) fn octet(self, kind: u16) -> Option<u8> {
        let [octet] = self.get(kind)?.try_into().ok()?;
        Some(octet)
    }

    /// A text, up to its terminator.
    pub(super) fn text(self, kind: u16) -> Option<&'a str> {
        let octets = self.get(kind)?;
        let end = octets.iter().position(|octet| *octet == 0).unwrap_or(octets.len());
        str::from_utf8(&octets[..end]).ok()
    }

    /// Whether all of them are of known types, and none is malformed.
    pub(super) fn are_all_in(self, known: &[u16]) -> bool {
        NlasIterator::new(self.0).all(|attribute| attribute.is_ok_and(|a| known.contains(&a.kind())))
    }
}

/// A refusal of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Number of the refused message.
    pub(super) sequence: u32,
    /// The error's number, positive.
    pub(super) errno: i32,
    /// What the kernel says beyond.
    pub(super) text: Option<String>,
    /// Where in the refused message the offending attribute begins.
    pub(super) offset: Option<usize>,
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        Self::from_raw_os_error(refusal.errno)
    }
}

/// A message that was received.
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// What follows `nfgenmsg`.
    pub(super) fn attributes(&self) -> Attributes<'a> {
        Attributes(self.payload.get(GENERIC..).unwrap_or_default())
    }

    /// The refusal in an `NLMSG_ERROR` or `NLMSG_DONE`; `None` if it has none.
    pub(super) fn refusal(&self) -> Option<Refusal> {
        let (code, rest) = self.payload.split_first_chunk::<4>()?;
        let errno = i32::from_ne_bytes(*code).checked_neg().filter(|errno| *errno != 0)?;
        let mut refusal = Refusal { sequence: self.sequence, errno, text: None, offset: None };
        if self.kind == NLMSG_ERROR && self.flags & NLM_F_ACK_TLVS != 0 {
            let copied = match NetlinkBuffer::new_checked(rest) {
                Ok(copy) if self.flags & NLM_F_CAPPED == 0 => copy.length() as usize,
                _ => HEADER,
            };
            // `NLMSGERR_ATTR_MSG` and `NLMSGERR_ATTR_OFFS`.
            let attributes = Attributes(rest.get(copied.next_multiple_of(4)..).unwrap_or_default());
            refusal.text = attributes.text(1).map(str::to_owned);
            let offset = attributes.get(2).and_then(|offset| offset.try_into().ok()).map(u32::from_ne_bytes);
            refusal.offset = offset.map(|offset| offset as usize);
        }
        Some(refusal)
    }
}

/// The messages of a datagram.
pub(super) fn messages(mut octets: &[u8]) -> impl Iterator<Item = io::Result<Message<'_>>> {
    std::iter::from_fn(move || {
        if octets.is_empty() {
            return None;
        }
        let Ok(message) = NetlinkBuffer::new_checked(octets) else {
            octets = &[];
            return Some(Err(io::Error::new(io::ErrorKind::InvalidData, "a truncated netlink message")));
        };
        octets = octets.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(Message {
            kind: message.message_type(),
            flags: message.flags(),
            sequence: message.sequence_number(),
            payload: message.payload(),
        }))
    })
}

/// A netlink socket of netfilter in one network namespace: that of the thread which opened it.
#[derive(Debug)]
pub(super) struct NfSocket {
    socket: Socket,
    /// The number of the next message.
    sequence: u32,
    buffer: Vec<u8>,
}

impl NfSocket {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// The system call's: `EPROTONOSUPPORT` on a kernel without netfilter's netlink.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        let _own: SocketAddr = socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Without a copy of the refused message, so that thousands of refusals fit.
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        Ok(Self { socket, sequence: 1, buffer: Vec::with_capacity(RECEIVED) })
    }

    /// Numbers for the next messages: the first of them.
    pub(super) fn reserve(&mut self, n_messages: u32) -> u32 {
        let first = self.sequence;
        self.sequence = first.wrapping_add(n_messages);
        first
    }

    /// Sends a request and gives each answer to `each`, without `nfgenmsg`. With `NLM_F_DUMP` among the flags
    /// the answers are a list. Returns whether the list may lack something because it changed meanwhile.
    ///
    /// # Errors
    ///
    /// The kernel's; `InvalidData` if an answer is malformed.
    pub(super) fn request(
        &mut self,
        head: Head,
        body: impl FnOnce(&mut Writer),
        mut each: impl FnMut(u16, Attributes<'_>),
    ) -> io::Result<bool> {
        let sequence = self.reserve(1);
        let mut writer = Writer::default();
        let acknowledged = if head.flags & NLM_F_DUMP == 0 { NLM_F_ACK } else { 0 };
        let flags = head.flags | NLM_F_REQUEST | acknowledged;
        writer.message(Head { flags, ..head }, sequence, body);
        let _all = self.socket.send(&writer.finish()?, 0)?;
        let mut is_interrupted = false;
        loop {
            self.receive(0)?;
            for message in messages(&self.buffer) {
                let message = message?;
                if message.sequence != sequence {
                    continue;
                }
                is_interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        return message.refusal().map_or(Ok(is_interrupted), |refusal| Err(refusal.into()));
                    }
                    kind => each(kind, message.attributes()),
                }
            }
        }
    }

    /// Sends a batch and returns what the kernel answers to its messages: how many it acknowledges, and what
    /// it refuses. Its messages are numbered from `first` on.
    ///
    /// The kernel handles a batch within the system call, so all answers are there when it returns.
    ///
    /// # Errors
    ///
    /// The system call's; `EPERM` without `CAP_NET_ADMIN`.
    pub(super) fn batch(&mut self, octets: &[u8], first: u32, n_messages: u32) -> io::Result<Answers> {
        let n_octets = octets.len();
        // The kernel refuses what is longer than the buffer, and accounts for some more. It doubles the
        // value.
        if setsockopt(&self.socket, sockopt::SndBufForce, &n_octets.max(64 << 10)).is_err() {
            setsockopt(&self.socket, sockopt::SndBuf, &n_octets.max(64 << 10))?;
        }
        let sent = self.socket.send(octets, 0)?;
        if sent != n_octets {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "the kernel took a part of a batch"));
        }
        let mut answers = Answers::default();
        loop {
            match self.receive(libc::MSG_DONTWAIT) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(answers),
                // Answers were lost; those before are still there.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => continue,
                Err(error) => return Err(error),
            }
            for message in messages(&self.buffer) {
                let message = message?;
                if message.kind != NLMSG_ERROR || message.sequence.wrapping_sub(first) >= n_messages {
                    continue;
                }
                match message.refusal() {
                    None => answers.n_acknowledged += 1,
                    Some(refusal) => answers.refusals.push(refusal),
                }
            }
        }
    }

    fn receive(&mut self, flags: i32) -> io::Result<()> {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, flags | libc::MSG_TRUNC) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(len) if len > self.buffer.len() => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink datagram is too long"));
                }
                other => return other.map(drop),
            }
        }
    }
}

/// The kernel's answers to a batch.
#[derive(Debug, Default)]
pub(super) struct Answers {
    /// How many of its messages it acknowledges.
    pub(super) n_acknowledged: usize,
    /// What it refuses, in order.
    pub(super) refusals: Vec<Refusal>,
}
