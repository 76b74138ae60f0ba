//! Records as master files have them (RFC 1035, 5.1).

use std::{fmt, str::FromStr};

use super::{Record, RecordData, RecordType, Soa};

impl fmt::Display for RecordType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::A => "A",
            Self::Aaaa => "AAAA",
            Self::Cname => "CNAME",
            Self::Ns => "NS",
            Self::Ptr => "PTR",
            Self::Soa => "SOA",
            Self::Srv => "SRV",
            Self::Txt => "TXT",
            Self::Any => "ANY",
            Self::Other => "other",
        })
    }
}

impl FromStr for RecordType {
    type Err = String;

    /// Parses the types of which a zone has records, in any case.
    fn from_str(text: &str) -> Result<Self, String> {
        const TYPES: [RecordType; 9] = [
            RecordType::A,
            RecordType::Aaaa,
            RecordType::Cname,
            RecordType::Ns,
            RecordType::Ptr,
            RecordType::Soa,
            RecordType::Srv,
            RecordType::Txt,
            RecordType::Any,
        ];
        let found = TYPES.into_iter().find(|kind| kind.to_string().eq_ignore_ascii_case(text));
        found.ok_or_else(|| "expected a, aaaa, cname, ns, ptr, soa, srv, txt or any".to_owned())
    }
}

impl fmt::Display for RecordData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::A(ip) => write!(f, "A {ip}"),
            Self::Aaaa(ip) => write!(f, "AAAA {ip}"),
            Self::Cname(name) => write!(f, "CNAME {name}."),
            Self::Ns(name) => write!(f, "NS {name}."),
            Self::Ptr(name) => write!(f, "PTR {name}."),
            Self::Soa(Soa { mname, rname, serial, refresh, retry, expire, minimum }) => {
                write!(f, "SOA {mname}. {rname}. {serial} {refresh} {retry} {expire} {minimum}")
            }
            Self::Srv { priority, weight, port, target } => {
                write!(f, "SRV {priority} {weight} {port} {target}.")
            }
            Self::Txt(text) => write!(f, "TXT {text:?}"),
        }
    }
}

impl Record {
    /// The line of a master file. `asked` is the name of the question, without the final dot.
    #[must_use]
    pub fn line(&self, asked: &str) -> String {
        format!("{}. {} IN {}", self.owner.as_deref().unwrap_or(asked), self.ttl, self.data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_master_file() {
        let soa = Soa {
            mname: "ns.dns.cluster.local".into(),
            rname: "hostmaster.cluster.local".into(),
            serial: 7,
            refresh: 7200,
            retry: 1800,
            expire: 86400,
            minimum: 5,
        };
        let target = "web.default.svc.cluster.local".into();
        for (data, expected) in [
            (RecordData::A([10, 96, 0, 80].into()), "a.b. 5 IN A 10.96.0.80"),
            (RecordData::Cname("example.com".into()), "a.b. 5 IN CNAME example.com."),
            (
                RecordData::Srv { priority: 0, weight: 100, port: 80, target },
                "a.b. 5 IN SRV 0 100 80 web.default.svc.cluster.local.",
            ),
            (
                RecordData::Soa(soa),
                "a.b. 5 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 7 7200 1800 86400 5",
            ),
            (RecordData::Txt("1.1.0".into()), "a.b. 5 IN TXT \"1.1.0\""),
        ] {
            assert_eq!(Record { owner: None, ttl: 5, data }.line("a.b"), expected);
        }
        assert_eq!("aaaa".parse(), Ok(RecordType::Aaaa));
        assert!("mx".parse::<RecordType>().is_err());
        let of_another = Record { owner: Some("c".into()), ttl: 5, data: RecordData::Ns("d".into()) };
        assert_eq!(of_another.line("a.b"), "c. 5 IN NS d.");
    }
}
