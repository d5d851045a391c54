//! A group taken apart, to be put together again by the program that takes this one's place.
//!
//! Sockets, program and maps are descriptors and go over by their numbers; the rest is a few numbers of ours. The kernel
//! notices nothing: the group of sockets and its program stay attached to each other throughout.
//!
//! The surprising rule: counters are not copied. They are in the map's memory, which the program in the kernel goes on
//! counting in while one image of this process follows another.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::PoisonError;

use super::classic::Positions;
use super::{Group, Mechanism, Member, Options, SPARE, ebpf, invalid};

/// All of a group. `F` is a descriptor, or a name for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts<F> {
    /// With its real port.
    pub address: SocketAddr,
    /// How its sockets are made.
    pub options: Options,
    /// Its sockets.
    pub places: Vec<Place<F>>,
    /// The live slots, as set last.
    pub live: Vec<u32>,
    /// What picks.
    pub picks: Picks<F>,
}

/// One socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place<F> {
    /// Whose.
    pub slot: u32,
    /// It listens.
    pub socket: F,
    /// Place in the program's map.
    pub index: u32,
    /// What that place had been given before.
    pub given_before: u64,
}

/// The program that picks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Picks<F> {
    /// Exact turns.
    Ebpf {
        /// The program.
        program: F,
        /// Its map of sockets.
        sockets: F,
        /// The memory it shares with us.
        state: F,
    },
    /// At random; the slots in the order of the kernel's array.
    Classic(Vec<u32>),
}

/// A program without a group, its map of sockets and its memory. `F` is a descriptor, or a name for one.
pub type Spare<F> = (F, F, F);

/// The programs that were loaded in advance ([`load_in_advance`](super::load_in_advance)) and that no group has taken, each
/// descriptor as `name` has it.
///
/// # Errors
///
/// Those of `name`.
pub fn spare_parts<N, E>(
    mut name: impl FnMut(BorrowedFd<'_>) -> Result<N, E>,
) -> Result<Vec<Spare<N>>, E> {
    let mut parts = Vec::new();
    for selector in SPARE.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        let (program, sockets, state) = selector.descriptors();
        parts.push((name(program)?, name(sockets)?, name(state)?));
    }
    Ok(parts)
}

/// Keeps programs for groups to come that another image of this process has loaded in advance.
///
/// # Errors
///
/// Those of mmap(2).
pub fn adopt_spare(parts: Vec<Spare<OwnedFd>>) -> io::Result<()> {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    for (program, sockets, state) in parts {
        spare.push(ebpf::Selector::adopt(program, sockets, state)?);
    }
    Ok(())
}

impl Group {
    /// What it consists of.
    pub fn parts(&self) -> Parts<BorrowedFd<'_>> {
        let place = |(slot, member): (&u32, &'_ Member)| (*slot, member.index, member.given_before);
        let places = self.members.iter().map(|entry| {
            let (slot, index, given_before) = place(entry);
            Place { slot, socket: entry.1.socket.as_fd(), index, given_before }
        });
        let picks = match &self.mechanism {
            Mechanism::Ebpf(selector) => {
                let (program, sockets, state) = selector.descriptors();
                Picks::Ebpf { program, sockets, state }
            }
            Mechanism::Classic(positions) => Picks::Classic(positions.all().to_vec()),
        };
        Parts {
            address: self.address,
            options: self.options,
            places: places.collect(),
            live: self.live.clone(),
            picks,
        }
    }

    /// Puts a group together that another image of this process has taken apart.
    ///
    /// # Errors
    ///
    /// `InvalidInput`: the parts do not fit each other. Those of mmap(2).
    pub fn from_parts(parts: Parts<OwnedFd>) -> io::Result<Group> {
        let Parts { address, options, places, live, picks } = parts;
        let mut indices = BTreeSet::new();
        let mut members = BTreeMap::new();
        for Place { slot, socket, index, given_before } in places {
            if index as usize >= ebpf::CAPACITY || !indices.insert(index) {
                return Err(invalid(format!("slot {slot} has no place of its own")));
            }
            if members.insert(slot, Member { socket, index, given_before }).is_some() {
                return Err(invalid(format!("slot {slot} is there twice")));
            }
        }
        if members.is_empty() || !live.iter().all(|slot| members.contains_key(slot)) {
            return Err(invalid("a group without sockets, or a live slot without one".to_owned()));
        }
        let mechanism = match picks {
            Picks::Ebpf { program, sockets, state } => {
                Mechanism::Ebpf(ebpf::Selector::adopt(program, sockets, state)?)
            }
            Picks::Classic(order) => {
                let known: BTreeSet<&u32> = order.iter().collect();
                if known.len() != order.len() || !order.iter().all(|one| members.contains_key(one))
                {
                    return Err(invalid("sockets are out of order".to_owned()));
                }
                Mechanism::Classic(Positions::from_order(order))
            }
        };
        Ok(Group { address, options, mechanism, fallback: None, members, live })
    }
}
