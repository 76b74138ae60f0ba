//! The layout of each pinned map.
//!
//! # Purpose
//!
//! [`Directory`] opens only pinned maps with the layout of this version. Two sources must agree: the kernel's
//! type, sizes and flags, and the map `layouts`. It holds, by map id, the fingerprint of the map's row in
//! `lb_common::maps`. An agent writes it before the map serves.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use aya::maps::{HashMap, Map, MapData, MapError};
use lb_common::{
    layout::MapIdentity,
    maps::{self, LAYOUTS, MAPS, MapSpec, Sizing},
};
use lb_core::plan::Capacity;

use super::{KernelError, adoption::PinState, fault, pod::Plain, syscall};

/// The kernel's description of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) id: u32,
    pub(super) max_entries: u32,
    kind: u32,
    key_size: u32,
    value_size: u32,
    flags: u32,
}

impl Shape {
    fn of(map: &MapData) -> Result<Self, MapError> {
        let info = map.info()?;
        Ok(Self {
            id: info.id(),
            max_entries: info.max_entries(),
            kind: info.map_type()? as u32,
            key_size: info.key_size(),
            value_size: info.value_size(),
            flags: info.map_flags(),
        })
    }

    /// Whether the map matches its row, apart from the number of entries.
    pub(super) fn fits(&self, spec: &MapSpec) -> bool {
        (self.kind, self.key_size, self.value_size, self.flags)
            == (spec.kind as u32, spec.key_size, spec.value_size, spec.flags)
    }
}

/// The identity of a map that this agent creates.
fn identity(spec: &MapSpec) -> MapIdentity {
    let spec = MapSpec { layout: fault::layout(spec), ..*spec };
    MapIdentity { fingerprint: spec.fingerprint(), layout: spec.layout, reserved: 0 }
}

fn row(name: &'static str) -> Result<&'static MapSpec, KernelError> {
    maps::find(name).ok_or(KernelError::Missing { kind: "map", name })
}

/// A directory of pinned maps.
pub(super) struct Directory {
    path: PathBuf,
    /// `None` if the map `layouts` is missing. The layouts of the other maps are then unknown.
    identities: Option<HashMap<MapData, u32, Plain<MapIdentity>>>,
}

impl Directory {
    /// Opens a directory, which may lack any or all maps.
    ///
    /// # Errors
    ///
    /// [`KernelError::Pin`] if `layouts` exists and cannot be opened.
    pub(super) fn open(path: &Path) -> Result<Self, KernelError> {
        let mut directory = Self { path: path.to_owned(), identities: None };
        if let Some((map, shape)) = directory.find(LAYOUTS)?
            && shape.fits(row(LAYOUTS)?)
        {
            directory.identities = Some(typed(map, LAYOUTS)?);
        }
        Ok(directory)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The map pinned under a name; `None` if there is none.
    fn find(&self, name: &'static str) -> Result<Option<(MapData, Shape)>, KernelError> {
        let fd = match syscall::open_pin(&self.path.join(name)) {
            Ok(fd) => fd,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(KernelError::NotPermitted { what: format!("opening the pinned map {name}") });
            }
            Err(source) => return Err(KernelError::Pin { name, source }),
        };
        let map = MapData::from_fd(fd).map_err(|source| KernelError::map(name, source))?;
        let shape = Shape::of(&map).map_err(|source| KernelError::map(name, source))?;
        Ok(Some((map, shape)))
    }

    fn identity_of(&self, id: u32) -> Result<Option<MapIdentity>, KernelError> {
        let Some(identities) = &self.identities else { return Ok(None) };
        match identities.get(&id, 0) {
            Ok(Plain(identity)) => Ok(Some(identity)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(KernelError::map(LAYOUTS, source)),
        }
    }

    /// Whether a map has this agent's layout.
    fn is_known(&self, spec: &MapSpec, shape: &Shape) -> Result<bool, KernelError> {
        let is_recorded = spec.name == LAYOUTS || self.identity_of(shape.id)? == Some(identity(spec));
        Ok(is_recorded && shape.fits(spec))
    }

    /// Opens a map that has the layout of this version.
    ///
    /// # Errors
    ///
    /// [`KernelError::NotPinned`], [`KernelError::Layout`], or a failing system call.
    pub(super) fn map(&self, name: &'static str) -> Result<(MapData, Shape), KernelError> {
        let spec = row(name)?;
        let Some((map, shape)) = self.find(name)? else {
            return Err(KernelError::NotPinned { name, path: self.path.clone() });
        };
        if !self.is_known(spec, &shape)? {
            let found = self.identity_of(shape.id)?.map(|found| found.layout);
            let ours = identity(spec).layout;
            return Err(KernelError::Layout { name, path: self.path.clone(), found, ours });
        }
        Ok((map, shape))
    }

    /// As [`Self::map`], with the map's type.
    pub(super) fn typed<T: TryFrom<Map, Error = MapError>>(
        &self,
        name: &'static str,
    ) -> Result<(T, Shape), KernelError> {
        let (map, shape) = self.map(name)?;
        Ok((typed(map, name)?, shape))
    }

    /// The standing of each map, for an agent with these sizes.
    pub(super) fn pin_states(
        &self,
        sizing: &Sizing,
    ) -> Result<Vec<(&'static MapSpec, PinState)>, KernelError> {
        let mut recorded = BTreeSet::new();
        for item in self.identities.iter().flat_map(HashMap::iter) {
            let (_id, Plain(identity)) = item.map_err(|source| KernelError::map(LAYOUTS, source))?;
            let _new = recorded.insert(identity.fingerprint);
        }
        let standing = |spec: &'static MapSpec| {
            let Some((_map, shape)) = self.find(spec.name)? else {
                let was_there = recorded.contains(&identity(spec).fingerprint);
                return Ok((spec, if was_there { PinState::Lost } else { PinState::New }));
            };
            let standing = if !self.is_known(spec, &shape)? {
                PinState::Foreign
            } else if shape.max_entries == spec.max_entries(sizing) {
                PinState::Same
            } else {
                PinState::OtherSize
            };
            Ok((spec, standing))
        };
        MAPS.iter().map(standing).collect()
    }

    /// The sizes of the pinned tables, in any layout; 0 for tables that are not pinned.
    pub(super) fn sizes(&self) -> Result<Capacity, KernelError> {
        let most = |names: [&'static str; 2]| {
            let entries = names.map(|name| Ok(self.find(name)?.map_or(0, |(_map, shape)| shape.max_entries)));
            entries.into_iter().try_fold(0, |most, entries: Result<u32, KernelError>| Ok(most.max(entries?)))
        };
        let [services, endpoints] = [["services4", "services6"], ["endpoints4", "endpoints6"]].map(most);
        Ok(Capacity { services: services?, endpoints: endpoints? })
    }

    /// Opens the maps that a loaded object has pinned here, and records their layouts.
    ///
    /// # Errors
    ///
    /// [`KernelError::Missing`] if a map does not match its row; a failing system call.
    pub(super) fn record(&mut self) -> Result<Vec<Held>, KernelError> {
        let mut held = Vec::with_capacity(MAPS.len());
        for spec in MAPS {
            let name = spec.name;
            let missing = KernelError::Missing { kind: "map of the expected type and sizes", name };
            let Some((map, shape)) = self.find(name)?.filter(|(_, shape)| shape.fits(spec)) else {
                return Err(missing);
            };
            let fd = syscall::open_pin(&self.path.join(name));
            held.push(Held {
                name,
                id: shape.id,
                fd: fd.map_err(|source| KernelError::Pin { name, source })?,
            });
            if name == LAYOUTS {
                self.identities = Some(typed(map, LAYOUTS)?);
            }
        }
        let identities =
            self.identities.as_mut().ok_or(KernelError::Missing { kind: "map", name: LAYOUTS })?;
        fault::point();
        for (spec, held) in MAPS.iter().zip(&held) {
            let written = identities.insert(held.id, Plain(identity(spec)), 0);
            written.map_err(|source| KernelError::map(LAYOUTS, source))?;
        }
        Ok(held)
    }

    /// Removes the records of maps that are no longer pinned here. Maps that other versions pin under their
    /// own names keep theirs.
    pub(super) fn forget_unpinned(&mut self) -> Result<(), KernelError> {
        let failed = |source| KernelError::PinPath { path: self.path.clone(), source };
        let mut pinned = BTreeSet::new();
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            // Links and directories are skipped.
            let map = entry
                .map(|entry| syscall::open_pin(&entry.path()).ok().map(MapData::from_fd))
                .map_err(failed)?;
            pinned.extend(map.and_then(Result::ok).and_then(|map| map.info().ok()).map(|info| info.id()));
        }
        let Some(identities) = &mut self.identities else { return Ok(()) };
        let known: Vec<u32> = identities.keys().filter_map(Result::ok).collect();
        for id in known.iter().filter(|id| !pinned.contains(id)) {
            identities.remove(id).map_err(|source| KernelError::map(LAYOUTS, source))?;
        }
        Ok(())
    }
}

fn typed<T: TryFrom<Map, Error = MapError>>(map: MapData, name: &'static str) -> Result<T, KernelError> {
    Map::from_map_data(map).and_then(T::try_from).map_err(|source| KernelError::map(name, source))
}

/// Opens a pinned map of this version's layout as a typed one.
///
/// # Errors
///
/// As [`Directory::map`].
pub(super) fn open_pinned<T: TryFrom<Map, Error = MapError>>(
    pin_path: &Path,
    name: &'static str,
) -> Result<T, KernelError> {
    Directory::open(pin_path)?.typed(name).map(|(map, _shape)| map)
}

/// A map that the programs of this agent use.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) name: &'static str,
    /// The kernel's map id.
    pub(super) id: u32,
    /// Keeps the map alive without its pin.
    pub(super) fd: OwnedFd,
}

/// The id of the map pinned at a path; `None` if there is none.
pub(super) fn pinned_id(path: &Path) -> Option<u32> {
    let map = MapData::from_fd(syscall::open_pin(path).ok()?).ok()?;
    map.info().ok().map(|info| info.id())
}
