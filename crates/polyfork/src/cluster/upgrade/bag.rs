//! Descriptors on their way to the image that takes this one's place: named in the old one, owned by the new one.
//!
//! Here is only the list, with what each is known again by; who has which descriptor is said in the parts of the state, by
//! [`Name`]. The checks against the kernel are `polyfork_sys::replace`'s.
//!
//! The rule that surprises: a name is no number of a descriptor but a place in the list. What is not in the list has no name,
//! so a damaged state cannot reach for the control socket of something else.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use polyfork_sys::replace::{self, Identity};
use serde::{Deserialize, Serialize};

use super::ResumeError;

/// A descriptor in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Name(u32);

/// Collects the descriptors that are left to the next image.
#[derive(Debug, Default)]
pub struct Packing {
    list: Descriptors,
    names: BTreeMap<i32, Name>,
}

/// The list itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptors {
    declared: Vec<Declared>,
    /// Inherited from who started the first image, and nobody's.
    others: Vec<i32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Declared {
    number: i32,
    kind: u8,
    device: u64,
    inode: u64,
}

impl Packing {
    /// With what this process was started with and nobody owns (`LISTEN_FDS` and the like).
    pub fn new() -> Packing {
        let others = polyfork_sys::system::inherited_fds();
        Packing { list: Descriptors { declared: Vec::new(), others }, names: BTreeMap::new() }
    }

    /// Leaves a descriptor to the next image. It must stay open until then; the same one has the same name each time.
    ///
    /// # Errors
    /// Those of fstat(2), and `InvalidInput` for a standard stream, which nobody can own.
    pub fn name(&mut self, fd: BorrowedFd<'_>) -> io::Result<Name> {
        let number = fd.as_raw_fd();
        if let Some(name) = self.names.get(&number) {
            return Ok(*name);
        }
        if number < 3 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a standard stream"));
        }
        let Identity { kind, device, inode } = replace::identity(fd)?;
        let name = Name(u32::try_from(self.list.declared.len()).unwrap_or(u32::MAX));
        self.list.declared.push(Declared { number, kind, device, inode });
        self.names.insert(number, name);
        Ok(name)
    }

    /// The list, complete.
    pub fn finish(self) -> Descriptors {
        self.list
    }
}

impl Descriptors {
    /// How many are left to the next image.
    pub fn len(&self) -> usize {
        self.declared.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.declared.is_empty()
    }

    /// Their numbers.
    pub fn numbers(&self) -> impl Iterator<Item = i32> + '_ {
        self.declared.iter().map(|one| one.number)
    }

    fn identities(&self) -> Vec<(i32, Identity)> {
        let identity = |one: &Declared| {
            let Declared { number, kind, device, inode } = *one;
            (number, Identity { kind, device, inode })
        };
        self.declared.iter().map(identity).collect()
    }
}

/// Descriptors that were left to this image.
#[derive(Debug)]
pub struct Unpacking(Vec<Held>);

#[derive(Debug)]
enum Held {
    Free(OwnedFd),
    Shared(Arc<OwnedFd>),
    Taken,
}

impl Unpacking {
    /// Checks each descriptor and owns it; closes whatever else is open. Once in the life of a process, before it has
    /// opened anything.
    ///
    /// # Errors
    /// When one is missing or is something else.
    pub fn adopt(list: &Descriptors) -> Result<Unpacking, ResumeError> {
        let owned = replace::adopt(&list.identities(), &list.others)
            .map_err(|error| ResumeError::Descriptor(error.to_string()))?;
        Ok(Unpacking(owned.into_iter().map(Held::Free).collect()))
    }

    /// A descriptor that only one has.
    ///
    /// # Errors
    /// When there is no such name, or somebody has it.
    pub fn take(&mut self, name: Name) -> Result<OwnedFd, ResumeError> {
        let held = self.0.get_mut(name.0 as usize).ok_or_else(|| unknown(name))?;
        match std::mem::replace(held, Held::Taken) {
            Held::Free(fd) => Ok(fd),
            other => {
                *held = other;
                Err(unknown(name))
            }
        }
    }

    /// A descriptor that several may have.
    ///
    /// # Errors
    /// When there is no such name, or one has it alone.
    pub fn share(&mut self, name: Name) -> Result<Arc<OwnedFd>, ResumeError> {
        let held = self.0.get_mut(name.0 as usize).ok_or_else(|| unknown(name))?;
        if let Held::Free(_) = held
            && let Held::Free(fd) = std::mem::replace(held, Held::Taken)
        {
            *held = Held::Shared(Arc::new(fd));
        }
        match held {
            Held::Shared(fd) => Ok(Arc::clone(fd)),
            _ => Err(unknown(name)),
        }
    }
}

fn unknown(name: Name) -> ResumeError {
    ResumeError::Descriptor(format!("descriptor {} of the state is not there, or taken", name.0))
}
