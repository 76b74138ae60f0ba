//! The offsets of fields in the running kernel's structures, from its BTF (`Documentation/bpf/btf.rst`).
//!
//! aya reads BTF to load programs, but does not expose it.

use std::{fs, io, path::Path};

/// The running kernel's BTF.
pub(super) const PATH: &str = "/sys/kernel/btf/vmlinux";

/// `BTF_MAGIC`, in the byte order of the machine.
const MAGIC: u16 = 0xeb9f;
/// `BTF_KIND_STRUCT`
const STRUCT: u32 = 4;
/// `BTF_KIND_FUNC`
const FUNCTION: u32 = 12;

/// Types of a kernel, in BTF's binary form.
pub(super) struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
}

/// A field of a structure, in bits from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// Offset in bits.
    pub(super) bit: u32,
}

/// `struct btf_type`, which is 12 octets: name, info, and size or type.
struct Type {
    at: usize,
    name: u32,
    kind: u32,
    n_members: usize,
    has_bitfields: bool,
}

impl Btf {
    /// Reads the BTF of the running kernel.
    ///
    /// # Errors
    ///
    /// `NotFound` without `CONFIG_DEBUG_INFO_BTF`, `InvalidData` for another format.
    pub(super) fn of_kernel() -> io::Result<Self> {
        Self::parse(&fs::read(Path::new(PATH))?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(data: &[u8]) -> Option<Self> {
        if u16::from_ne_bytes(data.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        // Length of the header, then offset and length of each section, relative to the end of the header.
        let header = usize::try_from(word(data, 4)?).ok()?;
        let section = |at| {
            let (offset, len) =
                (usize::try_from(word(data, at)?).ok()?, usize::try_from(word(data, at + 4)?).ok()?);
            let begin = header.checked_add(offset)?;
            Some(data.get(begin..begin.checked_add(len)?)?.to_vec())
        };
        Some(Self { types: section(8)?, strings: section(16)? })
    }

    /// Finds a field that is a direct member of a structure.
    pub(super) fn field(&self, structure: &str, field: &str) -> Option<Field> {
        let structures = self.types().filter(|found| found.kind == STRUCT);
        structures.filter(|found| self.is_named(found.name, structure)).find_map(|found| {
            (0..found.n_members).find_map(|n| {
                let member = found.at + 12 + n * 12;
                let is_wanted = self.is_named(word(&self.types, member)?, field);
                let offset = word(&self.types, member + 8)?;
                let bit = if found.has_bitfields { offset & 0xff_ffff } else { offset };
                is_wanted.then_some(Field { bit })
            })
        })
    }

    /// The BTF id of a function, which names the attach target of a program.
    pub(super) fn function(&self, name: &str) -> Option<u32> {
        // Ids count from 1: 0 is `void`, which is not listed.
        let mut types = (1..).zip(self.types());
        types.find(|(_, found)| found.kind == FUNCTION && self.is_named(found.name, name)).map(|(id, _)| id)
    }

    /// The types in the order of their ids, up to the first of an unknown kind.
    fn types(&self) -> impl Iterator<Item = Type> {
        let mut next = Some(0);
        std::iter::from_fn(move || {
            let at = next?;
            let (name, info) = (word(&self.types, at)?, word(&self.types, at + 4)?);
            let n_members = usize::try_from(info & 0xffff).ok()?;
            let found = Type { at, name, kind: info >> 24 & 0x1f, n_members, has_bitfields: info >> 31 != 0 };
            next = len_behind_header(found.kind, n_members).map(|len| at + 12 + len);
            Some(found)
        })
    }

    fn is_named(&self, offset: u32, name: &str) -> bool {
        let Some(rest) = usize::try_from(offset).ok().and_then(|offset| self.strings.get(offset..)) else {
            return false;
        };
        rest.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// Octets after a type's header, by its kind and number of members; `None` for an unknown kind.
fn len_behind_header(kind: u32, n_members: usize) -> Option<usize> {
    Some(match kind {
        // Pointers, forward declarations, typedefs, qualifiers, functions, floats, type tags.
        2 | 7..=12 | 16 | 18 => 0,
        // Integers, variables, declaration tags.
        1 | 14 | 17 => 4,
        // Arrays.
        3 => 12,
        // Structures, unions, sections, 64-bit enumerations.
        4 | 5 | 15 | 19 => 12 * n_members,
        // Enumerations, prototypes.
        6 | 13 => 8 * n_members,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An integer, `struct a { int x; }`, `struct b { int x; int flag:1 (at bit 33); }`, and a function `f`.
    fn example() -> Vec<u8> {
        let strings = b"\0int\0a\0x\0b\0flag\0f\0";
        let name = |wanted: &str| {
            let text = String::from_utf8(strings.to_vec()).unwrap();
            u32::try_from(text.find(&format!("\0{wanted}\0")).unwrap() + 1).unwrap()
        };
        let words = [
            [name("int"), 1 << 24, 4].as_slice(),
            &[32],
            &[name("a"), STRUCT << 24 | 1, 4],
            &[name("x"), 1, 0],
            &[name("b"), 1 << 31 | STRUCT << 24 | 2, 8],
            &[name("x"), 1, 0],
            &[name("flag"), 1, 1 << 24 | 0x21],
            &[name("f"), FUNCTION << 24, 0],
        ]
        .concat();
        let types: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut data = MAGIC.to_ne_bytes().to_vec();
        data.extend([1, 0]);
        let (n_types, n_strings) =
            (u32::try_from(types.len()).unwrap(), u32::try_from(strings.len()).unwrap());
        for word in [24, 0, n_types, n_types, n_strings] {
            data.extend(u32::to_ne_bytes(word));
        }
        data.extend(types);
        data.extend(strings);
        data
    }

    #[test]
    fn fields_are_found_by_name() {
        let btf = Btf::parse(&example()).unwrap();
        for (structure, field, bit) in [
            ("a", "x", Some(0)),
            ("b", "flag", Some(33)),
            ("b", "fla", None),
            ("a", "flag", None),
            ("c", "x", None),
        ] {
            assert_eq!(btf.field(structure, field), bit.map(|bit| Field { bit }), "{structure}.{field}");
        }
        assert_eq!(["f", "a", "g"].map(|name| btf.function(name)), [Some(4), None, None]);
    }

    #[test]
    fn cut_and_foreign_data_have_no_fields() {
        let whole = example();
        for len in 0..whole.len() {
            if let Some(btf) = Btf::parse(&whole[..len]) {
                assert_eq!(btf.field("b", "flag"), None, "{len}");
                assert_eq!(btf.function("f"), None, "{len}");
            }
        }
        assert!(Btf::parse(b"\x7fELF").is_none());
    }

    #[test]
    fn the_running_kernel_has_the_fields_that_programs_read() {
        let Ok(btf) = Btf::of_kernel() else { return };
        assert_eq!(btf.field("sock", "__sk_common"), Some(Field { bit: 0 }));
        assert!(btf.field("sock_common", "skc_cookie").is_some_and(|field| field.bit % 64 == 0));
    }
}
