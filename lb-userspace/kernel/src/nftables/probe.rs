//! Whether a kernel has what socklb's rules need.

use std::num::NonZeroU32;

use lb_core::packets::nft::{
    Base, ChainType, Change, CtKey, DataType, DynsetOp, Expression, Family, FibAddress, Hook, Key, LookupTo,
    Name, Numgen, Octets, Policy, Register, Reject, Rule, SetFlags, SetSpec, TableId, Transaction, Value,
    ValueType,
};

use super::{Nftables, NftablesError};
use crate::{KernelError, host};

/// kube-proxy's floor too: hosts with older kernels have an nft that fails when it lists such rules.
const OLDEST: (u32, u32) = (5, 13);

/// Checks that this kernel has what rules of a family need, in the caller's network namespace. It may load
/// modules, and changes nothing else.
///
/// # Errors
///
/// [`NftablesError::TooOld`] before 5.13; [`NftablesError::Missing`] without nftables;
/// [`NftablesError::Lacks`] names all modules that it lacks; else what prevents the check.
pub fn probe(family: Family) -> Result<(), NftablesError> {
    let release = host::kernel();
    if KernelError::is_older(&release, OLDEST) {
        return Err(NftablesError::TooOld { release });
    }
    let mut nftables = Nftables::open()?;
    let _generation = nftables.generation()?;
    let id = TableId { family, name: "socklb-probe".into() };
    let mut lacking = Vec::new();
    for (module, changes) in needs(family) {
        let changes = changes.into_iter().map(|change| (id.clone(), change)).collect();
        match nftables.check(&Transaction { changes, generation: None }) {
            Ok(()) => {}
            Err(NftablesError::Refused { .. }) => lacking.push(module),
            Err(error) => return Err(error),
        }
    }
    if lacking.is_empty() { Ok(()) } else { Err(NftablesError::Lacks(lacking)) }
}

/// Each module with changes that need it.
fn needs(family: Family) -> Vec<(&'static str, Vec<Change>)> {
    let (fib, reject) = match family {
        Family::V4 => ("nft_fib_ipv4", "nft_reject_ipv4"),
        Family::V6 => ("nft_fib_ipv6", "nft_reject_ipv6"),
    };
    let register = Register::FIRST;
    let filter = Some((ChainType::Filter, Hook::Prerouting));
    let nat = |hook| Some((ChainType::Nat, hook));
    let set = Name::from("set");
    let lookup = Expression::Lookup { set: set.clone(), from: register, to: LookupTo::Register(register) };
    let update = Expression::Dynset { set, op: DynsetOp::Update, key: register, value: None, timeout: None };
    let immediate = Expression::Immediate { value: [0; 8].into(), to: register };
    let fib_type = Expression::FibType { of: FibAddress::Destination, to: register };
    let numgen = Expression::Numgen { kind: Numgen::Random, modulus: 2, offset: 0, to: register };
    let dnat = Expression::Dnat { address: register, port: None };
    let address = match family {
        Family::V4 => Expression::Immediate { value: [0; 4].into(), to: register },
        Family::V6 => Expression::Immediate { value: [0; 16].into(), to: register },
    };
    let port = DataType::Port;
    let map = with_set(ValueType::Data(vec![port, port]), SetFlags::default(), None);
    let dynamic = with_set(ValueType::None, SetFlags::DYNAMIC | SetFlags::TIMEOUT, None);
    let range = Key { start: [0; 8].into(), end: Some(Octets::from([0, 1, 0, 0, 0, 1, 0, 0])) };
    vec![
        ("nf_tables with maps of concatenations", with_rule(map, filter, vec![immediate.clone(), lookup])),
        ("nf_tables with dynamic sets", with_rule(dynamic, filter, vec![immediate, update])),
        ("nf_tables with sets of ranges", with_set(ValueType::None, SetFlags::INTERVAL, Some(range))),
        ("nft_ct", with_rule(vec![], filter, vec![Expression::Ct { key: CtKey::State, to: register }])),
        (fib, with_rule(vec![], filter, vec![fib_type])),
        ("nft_numgen", with_rule(vec![], filter, vec![numgen])),
        (reject, with_rule(vec![], filter, vec![Expression::Reject(Reject::port_unreachable(family))])),
        ("nft_chain_nat", with_rule(vec![], nat(Hook::Prerouting), vec![])),
        ("nft_nat", with_rule(vec![], nat(Hook::Prerouting), vec![address, dnat])),
        (
            "nft_masq",
            with_rule(
                vec![],
                nat(Hook::Postrouting),
                vec![Expression::Masquerade { ports: None, is_fully_random: true }],
            ),
        ),
    ]
}

/// A table with a set.
fn with_set(value: ValueType, flags: SetFlags, element: Option<Key>) -> Vec<Change> {
    let key = vec![DataType::Port, DataType::Port];
    let size = NonZeroU32::new(16);
    let spec = SetSpec { key, value, flags, timeout: None, size };
    let name = Name::from("set");
    let elements = element.map(|key| Change::AddElements(name.clone(), vec![(key, Value::None.into())]));
    [Change::AddTable, Change::AddSet(name, spec)].into_iter().chain(elements).collect()
}

/// A table with a base chain and a rule, after other changes.
fn with_rule(
    mut changes: Vec<Change>,
    base: Option<(ChainType, Hook)>,
    expressions: Vec<Expression>,
) -> Vec<Change> {
    let name = Name::from("chain");
    let base = base.map(|(kind, hook)| Base { kind, hook, priority: 0, policy: Policy::Accept });
    changes.extend([
        Change::AddTable,
        Change::AddChain(name.clone(), base),
        Change::AddRule(name, Rule { expressions, comment: None }),
    ]);
    changes
}
