//! Changes and reads nftables' rules over netlink: the values of [`lb_core::packets::nft`] to and from the
//! kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use lb_core::packets::nft::{Change, Element, Hook, Key, Name, Octets, Policy, Table, TableId, Transaction};
use netlink_packet_core::NLM_F_DUMP;
use nix::libc;

use self::decode::element;
use crate::{
    fault,
    nfnetlink::{Attributes, Head, NfSocket, Refusal, Writer, family_number},
};

mod decode;
mod encode;
mod probe;
#[cfg(test)]
mod tests;
mod wire;

pub use self::probe::probe;

/// How often a table is read that changes meanwhile.
const MAX_READS: usize = 8;

/// Rules could not be changed or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NftablesError {
    /// The kernel has no nftables.
    #[error(
        "nftables: this kernel lacks it: load the module nf_tables, or use a kernel with CONFIG_NF_TABLES"
    )]
    Missing,
    /// The kernel is older than the oldest one whose host programs understand the rules.
    #[error(
        "nftables: {release} is too old: packets need Linux 5.13 or later, since the nft of older hosts fails at \
         such rules"
    )]
    TooOld {
        /// Name and release of the kernel.
        release: String,
    },
    /// The kernel lacks a part of nftables.
    #[error("nftables: this kernel lacks {}: load these modules, or use a kernel that has them", .0.join(", "))]
    Lacks(Vec<&'static str>),
    /// Not enough privilege.
    #[error("nftables: not permitted: run as root, or with CAP_NET_ADMIN")]
    NotPermitted,
    /// The kernel refuses a change. It made none of the transaction.
    #[error(
        "nftables: table {table}: cannot {what}: {source}{}{}",
        text.as_ref().map_or_else(String::new, |text| format!(" ({text})")),
        if *n_others == 0 { String::new() } else { format!("; {n_others} more changes are refused") }
    )]
    Refused {
        /// The table.
        table: TableId,
        /// The change, such as `add a rule to chain services`.
        what: String,
        /// The cause.
        source: io::Error,
        /// What the kernel says beyond.
        text: Option<String>,
        /// How many further messages it refused.
        n_others: usize,
    },
    /// The rules changed since the generation that the transaction names. The kernel made no change.
    #[error("nftables: the rules of this network namespace changed meanwhile: read them again")]
    Changed,
    /// The kernel's answers were lost, so the transaction may have happened or not.
    #[error("nftables: the kernel's answer to a transaction was lost: read the table again")]
    Lost,
    /// A table changed each time that it was read.
    #[error("nftables: table {0}: it changes while it is read: try again later")]
    Busy(TableId),
    /// A system call failed.
    #[error("nftables: {what}: {source}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

impl NftablesError {
    /// Whether a change was refused because the object that it names is missing.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Refused { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    fn socket(what: &'static str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted,
            Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP) => Self::Missing,
            _ => Self::Socket { what, source },
        }
    }
}

/// nftables in one network namespace: that of the thread which opened it.
///
/// Its calls block, for up to a second if they are about a hundred thousand elements.
#[derive(Debug)]
pub struct Nftables {
    socket: NfSocket,
}

impl Nftables {
    /// Opens the netlink socket.
    ///
    /// # Errors
    ///
    /// [`NftablesError::Missing`] on a kernel without netfilter's netlink.
    pub fn open() -> Result<Self, NftablesError> {
        let socket =
            NfSocket::open().map_err(|error| NftablesError::socket("cannot open a socket", error))?;
        Ok(Self { socket })
    }

    /// The generation of the namespace's rules. Every transaction of any program increases it.
    ///
    /// # Errors
    ///
    /// [`NftablesError::Missing`] on a kernel without nftables.
    pub fn generation(&mut self) -> Result<u32, NftablesError> {
        let head = Head { kind: wire::message::GET_GENERATION, flags: 0, family: 0, resource: 0 };
        let mut generation = None;
        let asked = self.socket.request(
            head,
            |_no_attributes| {},
            |kind, attributes| {
                if kind == wire::message::NEW_GENERATION {
                    generation = attributes.be32(wire::generation::ID);
                }
            },
        );
        let answered = asked.and_then(|_| generation.ok_or_else(|| io::ErrorKind::InvalidData.into()));
        answered.map_err(|error| match error.raw_os_error() {
            // What netfilter answers for a subsystem that it lacks.
            Some(libc::EINVAL) => NftablesError::Missing,
            _ => NftablesError::socket("cannot read the generation", error),
        })
    }

    /// Makes all changes of a transaction, or none. Packets see the rules from before or from after it.
    ///
    /// # Errors
    ///
    /// [`NftablesError::Refused`] names the first change that the kernel refuses, [`NftablesError::Changed`]
    /// says that the rules have another generation than the transaction expects. After either, nothing
    /// changed. After [`NftablesError::Lost`] that is unknown.
    ///
    /// # Kernel
    ///
    /// 5.13, see [`probe`].
    pub fn apply(&mut self, transaction: &Transaction) -> Result<(), NftablesError> {
        fault::point();
        self.send(transaction, true)
    }

    /// Whether the kernel would make these changes. It makes none of them, and the generation stays.
    ///
    /// # Errors
    ///
    /// As [`Self::apply`].
    pub fn check(&mut self, transaction: &Transaction) -> Result<(), NftablesError> {
        self.send(transaction, false)
    }

    fn send(&mut self, transaction: &Transaction, has_end: bool) -> Result<(), NftablesError> {
        // A message carries a change, or of a list of elements about a thousand.
        let most = transaction.changes.iter().map(|(_, change)| 1 + n_elements(change)).sum::<usize>() + 2;
        let first = self.socket.reserve(u32::try_from(most).unwrap_or(u32::MAX));
        let batch = encode::batch(transaction, first, has_end)
            .map_err(|source| NftablesError::Socket { what: "a name or a rule is too long", source })?;
        if batch.messages.is_empty() {
            return Ok(());
        }
        let n_messages = u32::try_from(batch.messages.len() + 2).unwrap_or(u32::MAX);
        let answers = self
            .socket
            .batch(&batch.octets, first, n_messages)
            .map_err(|error| NftablesError::socket("cannot send a transaction", error))?;
        match answers.refusals.first() {
            None if answers.n_acknowledged == 0 => Err(NftablesError::Lost),
            None => Ok(()),
            Some(refusal) => Err(refused(transaction, &batch, first, refusal, answers.refusals.len() - 1)),
        }
    }

    /// Deletes tables, all in one transaction. Returns those that there were.
    ///
    /// # Errors
    ///
    /// As [`Self::apply`].
    pub fn remove(&mut self, tables: &[TableId]) -> Result<Vec<TableId>, NftablesError> {
        let mut found = Vec::new();
        for id in tables {
            if self.has(id)? {
                found.push(id.clone());
            }
        }
        // Deleting is refused without a table: another program may delete it meanwhile.
        let both = |id: &TableId| [Change::AddTable, Change::DeleteTable].map(|change| (id.clone(), change));
        self.apply(&Transaction { changes: found.iter().flat_map(both).collect(), generation: None })?;
        Ok(found)
    }

    /// Whether there is such a table.
    ///
    /// # Errors
    ///
    /// [`NftablesError::Missing`] on a kernel without nftables; [`NftablesError::NotPermitted`].
    pub fn has(&mut self, id: &TableId) -> Result<bool, NftablesError> {
        Ok(self.handle(id)?.is_some())
    }

    /// The number of a table, which no other table of the namespace has had; `None` if there is no such
    /// table.
    ///
    /// # Errors
    ///
    /// As [`Self::has`].
    pub fn handle(&mut self, id: &TableId) -> Result<Option<u64>, NftablesError> {
        let named = |writer: &mut Writer| writer.text(wire::table::NAME, &id.name);
        let mut handle = 0;
        let read = self.get(id, wire::message::GET_TABLE, 0, named, |attributes| {
            handle = attributes.be64(wire::table::HANDLE).unwrap_or_default();
        });
        Ok(found(read, "cannot read a table")?.map(|_is_whole| handle))
    }

    /// Whether a table has such a chain.
    ///
    /// # Errors
    ///
    /// As [`Self::has`].
    pub fn has_chain(&mut self, id: &TableId, chain: &str) -> Result<bool, NftablesError> {
        let named = |writer: &mut Writer| {
            writer.text(wire::chain::TABLE, &id.name);
            writer.text(wire::chain::NAME, chain);
        };
        let read = self.get(id, wire::message::GET_CHAIN, 0, named, |_attributes| {});
        Ok(found(read, "cannot read a chain")?.is_some())
    }

    /// The base chains of all tables that drop forwarded packets unless a rule accepts them, each with its
    /// table.
    ///
    /// # Errors
    ///
    /// As [`Self::has`].
    pub fn chains_that_drop_forwarded(&mut self) -> Result<Vec<String>, NftablesError> {
        let mut chains = Vec::new();
        for (family, number) in [("ip", 2), ("inet", 1), ("ip6", 10)] {
            let head =
                Head { kind: wire::message::GET_CHAIN, flags: NLM_F_DUMP, family: number, resource: 0 };
            let read = self.socket.request(
                head,
                |_all| {},
                |_kind, attributes| {
                    let is_dropping = decode::chain(attributes).and_then(|(name, chain)| {
                        let base = chain.base?;
                        (base.hook == Hook::Forward && base.policy == Policy::Drop).then_some(name)
                    });
                    if let (Some(chain), Some(table)) = (is_dropping, attributes.text(wire::chain::TABLE)) {
                        chains.push(format!("{family} {table} {chain}"));
                    }
                },
            );
            let _is_whole = found(read, "cannot read chains")?;
        }
        Ok(chains)
    }

    /// Reads a table, and the generation in which it was so; `None` if there is no such table.
    ///
    /// Elements of dynamic sets are among what is read. Time-outs are as the kernel keeps them, in multiples
    /// of its clock tick.
    ///
    /// # Errors
    ///
    /// [`NftablesError::Busy`] if programs change rules all the time, of this table or another.
    pub fn read(&mut self, table: &TableId) -> Result<(Option<Table>, u32), NftablesError> {
        self.read_with(table, |nftables, table, id| {
            let mut is_interrupted = false;
            for (name, set) in &mut table.sets {
                let (elements, is_changing) = nftables.elements_once(id, name)?;
                set.elements = elements;
                is_interrupted |= is_changing;
            }
            Ok(is_interrupted)
        })
    }

    /// As [`Self::read`], with only those elements that `wanted` names, sets and keys, until it names none
    /// beyond them. It is called with what has been read so far. A key of a set of ranges stands for the
    /// range that has it.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub fn read_wanted(
        &mut self,
        table: &TableId,
        wanted: impl Fn(&Table) -> BTreeSet<(Name, Octets)>,
    ) -> Result<(Option<Table>, u32), NftablesError> {
        self.read_with(table, |nftables, table, id| {
            let mut asked = BTreeSet::new();
            loop {
                let new: Vec<_> = wanted(table).into_iter().filter(|one| asked.insert(one.clone())).collect();
                if new.is_empty() {
                    return Ok(false);
                }
                for (name, key) in new {
                    let element = nftables.element_once(id, &name, &key)?;
                    if let (Some(set), Some((key, element))) = (table.sets.get_mut(&name), element) {
                        set.elements.insert(key, element);
                    }
                }
            }
        })
    }

    /// Reads a table whose elements `fill` reads. That returns whether the table changed meanwhile.
    fn read_with(
        &mut self,
        table: &TableId,
        mut fill: impl FnMut(&mut Self, &mut Table, &TableId) -> io::Result<bool>,
    ) -> Result<(Option<Table>, u32), NftablesError> {
        for _ in 0..MAX_READS {
            let before = self.generation()?;
            let read = self.read_once(table, &mut fill);
            if self.generation()? != before {
                continue;
            }
            match read {
                Ok((_, true)) => {}
                Ok((found, false)) => return Ok((found, before)),
                Err(error) => return Err(NftablesError::socket("cannot read a table", error)),
            }
        }
        Err(NftablesError::Busy(table.clone()))
    }

    /// Also returns whether the table changed meanwhile.
    fn read_once(
        &mut self,
        id: &TableId,
        fill: &mut impl FnMut(&mut Self, &mut Table, &TableId) -> io::Result<bool>,
    ) -> io::Result<(Option<Table>, bool)> {
        use wire::message;
        let mut table = Table::default();
        let named = |writer: &mut Writer| writer.text(wire::table::NAME, &id.name);
        let found = self.get(id, message::GET_TABLE, 0, named, |attributes| {
            table.flags = attributes.be32(wire::table::FLAGS).unwrap_or_default();
        });
        match found {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((None, false)),
            found => found?,
        };
        // In all these messages the table's name is the first attribute, and most kernels list only what is
        // in it.
        let is_ours = |attributes: &Attributes<'_>| attributes.text(wire::table::NAME) == Some(&*id.name);
        let mut is_interrupted = self.get(id, message::GET_CHAIN, NLM_F_DUMP, named, |attributes| {
            table.chains.extend(decode::chain(attributes).filter(|_| is_ours(&attributes)));
        })?;
        is_interrupted |= self.get(id, message::GET_RULE, NLM_F_DUMP, named, |attributes| {
            if let Some((chain, rule)) = decode::rule(attributes, id.family).filter(|_| is_ours(&attributes))
            {
                table.chains.entry(chain).or_default().rules.push(rule);
            }
        })?;
        is_interrupted |= self.get(id, message::GET_SET, NLM_F_DUMP, named, |attributes| {
            table.sets.extend(decode::set(attributes).filter(|_| is_ours(&attributes)));
        })?;
        is_interrupted |= fill(self, &mut table, id)?;
        Ok((Some(table), is_interrupted))
    }

    /// Reads the element of a set that has a key; `None` if there is none.
    fn element_once(&mut self, id: &TableId, set: &str, key: &Octets) -> io::Result<Option<(Key, Element)>> {
        let named = |writer: &mut Writer| {
            writer.text(wire::elements::TABLE, &id.name);
            writer.text(wire::elements::SET, set);
            encode::key(writer, key);
        };
        let mut found = None;
        let read = self.get(id, wire::message::GET_ELEMENT, 0, named, |attributes| {
            let list = attributes.nested(wire::elements::ELEMENTS).unwrap_or(Attributes(&[]));
            found = list.iter().map(|(_, octets)| element(Attributes(octets))).next();
        });
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(|_| found),
        }
    }

    /// Also returns whether rules changed meanwhile.
    fn elements_once(&mut self, id: &TableId, set: &str) -> io::Result<(BTreeMap<Key, Element>, bool)> {
        let named = |writer: &mut Writer| {
            writer.text(wire::elements::TABLE, &id.name);
            writer.text(wire::elements::SET, set);
        };
        let mut elements = Vec::new();
        let is_interrupted = self.get(id, wire::message::GET_ELEMENT, NLM_F_DUMP, named, |attributes| {
            let list = attributes.nested(wire::elements::ELEMENTS).unwrap_or(Attributes(&[]));
            elements.extend(list.iter().map(|(_, octets)| element(Attributes(octets))));
        })?;
        // Sorted at once, which is faster than one by one.
        Ok((BTreeMap::from_iter(elements), is_interrupted))
    }

    /// Reads the elements of a set; none if there is no such set. Rules may add some meanwhile.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub fn elements(&mut self, id: &TableId, set: &str) -> Result<BTreeMap<Key, Element>, NftablesError> {
        let read = found(self.elements_once(id, set), "cannot read a set")?;
        Ok(read.map(|(elements, _may_lack_new_ones)| elements).unwrap_or_default())
    }

    /// Sends one request about a family. The answers to a `GET` have the number of the `NEW` before it.
    fn get(
        &mut self,
        id: &TableId,
        kind: u16,
        flags: u16,
        body: impl FnOnce(&mut Writer),
        mut each: impl FnMut(Attributes<'_>),
    ) -> io::Result<bool> {
        let head = Head { kind, flags, family: family_number(id.family), resource: 0 };
        self.socket.request(head, body, |answer, attributes| {
            if answer == kind - 1 {
                each(attributes);
            }
        })
    }
}

/// What was read; `None` if there is no such object.
fn found<T>(read: io::Result<T>, what: &'static str) -> Result<Option<T>, NftablesError> {
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some).map_err(|error| NftablesError::socket(what, error)),
    }
}

/// The error for the first of the refusals.
fn refused(
    transaction: &Transaction,
    batch: &encode::Batch,
    first: u32,
    refusal: &Refusal,
    n_others: usize,
) -> NftablesError {
    let source = io::Error::from_raw_os_error(refusal.errno);
    // The beginning of the batch has the first number. Errors of the whole batch name it.
    let n = (refusal.sequence.wrapping_sub(first) as usize).checked_sub(1);
    let Some(((n, start), message)) = n.and_then(|n| Some((*batch.messages.get(n)?, n))) else {
        return match refusal.errno {
            libc::ERESTART => NftablesError::Changed,
            _ => NftablesError::socket("cannot commit a transaction", source),
        };
    };
    let Some((table, change)) = transaction.changes.get(n) else {
        return NftablesError::socket("cannot commit a transaction", source);
    };
    let end = batch.messages.get(message + 1).map_or(batch.octets.len(), |(_, start)| *start);
    let octets = &batch.octets[start..end];
    NftablesError::Refused {
        table: table.clone(),
        what: describe(change, refusal.offset.and_then(|offset| octets.get(offset..))),
        source,
        text: refusal.text.clone(),
        n_others,
    }
}

/// What a change does, in a few words. `at` begins with the attribute that the kernel complains of.
fn describe(change: &Change, at: Option<&[u8]>) -> String {
    let keyed = |name: &Name, what: &str| {
        let element = at.and_then(|octets| Attributes(octets).get(wire::list::ELEMENT));
        let key = element.map(element_key).unwrap_or_default();
        format!("{what} set {name}{key}")
    };
    match change {
        Change::AddTable => "add it".to_owned(),
        Change::DeleteTable => "delete it".to_owned(),
        Change::AddChain(name, _) => format!("add chain {name}"),
        Change::DeleteChain(name) => format!("delete chain {name}"),
        Change::FlushChain(name) => format!("delete the rules of chain {name}"),
        Change::AddRule(name, _) => format!("add a rule to chain {name}"),
        Change::AddSet(name, _) => format!("add set {name}"),
        Change::DeleteSet(name) => format!("delete set {name}"),
        Change::FlushSet(name) => format!("delete all elements of set {name}"),
        Change::AddElements(name, _) => keyed(name, "add elements to"),
        Change::DeleteElements(name, _) => keyed(name, "delete elements of"),
    }
}

fn element_key(octets: &[u8]) -> String {
    let (key, _) = element(Attributes(octets));
    key.end.map_or_else(
        || format!(", element {:?}", key.start),
        |end| format!(", element {:?} to {end:?}", key.start),
    )
}

fn n_elements(change: &Change) -> usize {
    match change {
        Change::AddElements(_, elements) => elements.len(),
        Change::DeleteElements(_, keys) => keys.len(),
        _ => 0,
    }
}
