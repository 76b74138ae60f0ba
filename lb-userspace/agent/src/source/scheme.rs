//! The kinds of sources, by the scheme that `--source` names.

use std::{fmt, path::PathBuf, pin::Pin, sync::Arc};

use super::{
    Source,
    cluster::{self, Access},
    files,
};

/// Every kind of source. A new one is a file with a [`Scheme`], and a line here.
pub const SCHEMES: [&Scheme; 2] = [&cluster::SCHEME, &files::SCHEME];

/// The result of opening a source.
pub type Opening = Pin<Box<dyn Future<Output = anyhow::Result<Box<dyn Source>>> + Send>>;

/// A kind of source.
#[derive(Debug)]
pub struct Scheme {
    /// Its name, which stands before the colon.
    pub name: &'static str,
    /// What stands after the colon, as help texts call it; `None` if nothing does.
    pub address: Option<&'static str>,
    /// Opens a source, from what stands after the colon. Must be called within a tokio runtime.
    pub open: fn(String, Setup) -> Opening,
}

/// Settings that a source may need besides its address.
#[expect(clippy::struct_excessive_bools, reason = "independent settings")]
#[derive(Clone, Debug)]
pub struct Setup {
    /// `--service-proxy-name`
    pub service_proxy_name: Option<String>,
    /// The own node.
    pub node_name: Arc<str>,
    /// `--node-ports-of-other-nodes`
    pub other_nodes: bool,
    /// `--exclude-pods`
    pub pods: bool,
    /// Whether service networks are read: not with `--service-cidr=none`.
    pub service_cidrs: bool,
    /// `--names`
    pub names: bool,
    /// How to reach the API server.
    pub access: Access,
    /// `--state-dir`: the snapshot of the last objects.
    pub state_dir: PathBuf,
}

/// A source as `--source` names it: `SCHEME` or `SCHEME:ADDRESS`.
#[derive(Clone, Debug)]
pub struct Location {
    scheme: &'static Scheme,
    address: String,
}

impl Location {
    /// The API server.
    #[must_use]
    pub fn api_server() -> Self {
        Self { scheme: &cluster::SCHEME, address: String::new() }
    }

    /// Parses the text of a setting.
    ///
    /// # Errors
    ///
    /// A sentence about what is expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, address) =
            text.split_once(':').map_or((text, None), |(name, address)| (name, Some(address)));
        let is_meant = |scheme: &&&Scheme| match (scheme.address, address) {
            (None, None) => scheme.name == name,
            (Some(_), Some(address)) => scheme.name == name && !address.is_empty(),
            _ => false,
        };
        let found = SCHEMES.iter().find(is_meant).copied();
        found.map(|scheme| Self { scheme, address: address.unwrap_or_default().to_owned() }).ok_or_else(
            || {
                let forms = SCHEMES.map(|scheme| match scheme.address {
                    Some(address) => format!("{}:{address}", scheme.name),
                    None => scheme.name.to_owned(),
                });
                format!("expected {}", forms.join(" or "))
            },
        )
    }

    /// Opens the source.
    ///
    /// # Errors
    ///
    /// If it cannot exist as named. A server that does not answer is no error: the source retries.
    pub async fn open(self, setup: Setup) -> anyhow::Result<Box<dyn Source>> {
        (self.scheme.open)(self.address, setup).await
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.scheme.name)?;
        if self.scheme.address.is_some() { write!(f, ":{}", self.address) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_scheme_and_its_address() {
        for text in ["kube", "file:a/b", "file:a:b"] {
            assert_eq!(Location::parse(text).map(|location| location.to_string()), Ok(text.to_owned()));
        }
        for wrong in ["", "file", "file:", "a/b", "kubernetes", "kube:", "kube:a", ":a"] {
            assert_eq!(Location::parse(wrong).unwrap_err(), "expected kube or file:PATH", "{wrong:?}");
        }
    }
}
