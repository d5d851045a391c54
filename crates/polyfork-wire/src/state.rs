//! The envelope of a primary's state on its way to its successor.
//!
//! | bytes | |
//! | --- | --- |
//! | 8 | `PLYFRK` and two zero bytes |
//! | 4 | version of what is inside, little-endian |
//! | 8 | length of what is inside |
//! | 8 | a sum over version, length and what is inside |
//! | the rest | what is inside |
//!
//! Nothing is read by lines, and nothing inside is looked at before all of the envelope was found to be right.
//!
//! The surprising rule: every version but one's own is refused, also a newer one that might be understood. A primary that
//! takes over half of what it should have is worse than the old one that goes on.
//!
//! The sum finds damage, not malice: who can write to a primary's memory needs no state to do harm. It is FNV-1a of 64 bits,
//! in which any single changed byte changes the result.

pub mod shape;

/// The version of what this release puts inside. Another shape of it is another version: tests hold it to this one.
pub const VERSION: u32 = 1;
/// A state is some hundred bytes for each worker and each address, and what waits in channels.
pub const LONGEST: usize = 256 << 20;

const MAGIC: [u8; 8] = *b"PLYFRK\0\0";
const HEADER_BYTES: usize = 8 + 4 + 8 + 8;

/// Why a state is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// It is something else.
    #[error("it is no state of a primary")]
    NotOurs,
    /// Another release made it.
    #[error("it has version {theirs}, only version {ours} is known here")]
    Version {
        /// What is known here.
        ours: u32,
        /// What was found.
        theirs: u32,
    },
    /// Some of it is missing, or there is more than there should be.
    #[error("it is cut short or too long: {there} bytes of {announced}")]
    Length {
        /// As its head says.
        announced: u64,
        /// As it is.
        there: u64,
    },
    /// It is longer than any honest one.
    #[error("it is longer than {LONGEST} bytes")]
    TooLong,
    /// Its bytes are not those that were written.
    #[error("it is damaged")]
    Damaged,
    /// What is inside makes no sense.
    #[error("what is in it makes no sense: {0}")]
    Inside(String),
}

/// Puts `inside` into an envelope.
///
/// # Errors
///
/// [`StateError::TooLong`].
pub fn seal(inside: &[u8]) -> Result<Vec<u8>, StateError> {
    seal_as(VERSION, inside)
}

/// As [`seal`], for another version: what another release would make.
///
/// # Errors
///
/// [`StateError::TooLong`].
pub fn seal_as(version: u32, inside: &[u8]) -> Result<Vec<u8>, StateError> {
    if inside.len() > LONGEST {
        return Err(StateError::TooLong);
    }
    let length = inside.len() as u64;
    let mut sealed = Vec::with_capacity(HEADER_BYTES + inside.len());
    sealed.extend_from_slice(&MAGIC);
    sealed.extend_from_slice(&version.to_le_bytes());
    sealed.extend_from_slice(&length.to_le_bytes());
    sealed.extend_from_slice(&sum(version, length, inside).to_le_bytes());
    sealed.extend_from_slice(inside);
    Ok(sealed)
}

/// What is in an envelope.
///
/// # Errors
///
/// [`StateError`]; [`StateError::Inside`] is left to whoever reads on.
pub fn open(sealed: &[u8]) -> Result<&[u8], StateError> {
    let (magic, rest) = sealed.split_first_chunk::<8>().ok_or(StateError::NotOurs)?;
    if *magic != MAGIC {
        return Err(StateError::NotOurs);
    }
    let there = sealed.len() as u64;
    let cut = StateError::Length { announced: HEADER_BYTES as u64, there };
    let (version, rest) = rest.split_first_chunk::<4>().ok_or(cut.clone())?;
    let theirs = u32::from_le_bytes(*version);
    if theirs != VERSION {
        return Err(StateError::Version { ours: VERSION, theirs });
    }
    let (length, rest) = rest.split_first_chunk::<8>().ok_or(cut.clone())?;
    let (expected, inside) = rest.split_first_chunk::<8>().ok_or(cut)?;
    let length = u64::from_le_bytes(*length);
    if length > LONGEST as u64 {
        return Err(StateError::TooLong);
    }
    if length != inside.len() as u64 {
        let announced = length + HEADER_BYTES as u64;
        return Err(StateError::Length { announced, there });
    }
    if sum(theirs, length, inside) != u64::from_le_bytes(*expected) {
        return Err(StateError::Damaged);
    }
    Ok(inside)
}

fn sum(version: u32, length: u64, inside: &[u8]) -> u64 {
    const START: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let step = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(PRIME);
    let sum = version.to_le_bytes().iter().fold(START, step);
    let sum = length.to_le_bytes().iter().fold(sum, step);
    inside.iter().fold(sum, step)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_was_sealed_is_found_again() {
        assert_eq!(open(&seal(b"state").unwrap()), Ok(&b"state"[..]));
        assert_eq!(open(&seal(b"").unwrap()), Ok(&b""[..]));
    }

    #[test]
    fn fault_37_every_flipped_byte_and_every_cut_is_noticed() {
        let sealed = seal(b"the state of a primary, in short").unwrap();
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut damaged = sealed.clone();
                damaged[at] ^= 1 << bit;
                assert!(open(&damaged).is_err(), "byte {at}, bit {bit}");
            }
            assert!(open(&sealed[..at]).is_err(), "cut at {at}");
        }
        assert!(open(&[&sealed[..], b"x"].concat()).is_err(), "one byte more");
    }

    #[test]
    fn fault_37_other_versions_are_named() {
        for theirs in [VERSION - 1, VERSION + 1, u32::MAX] {
            let error = open(&seal_as(theirs, b"x").unwrap()).unwrap_err();
            assert_eq!(error, StateError::Version { ours: VERSION, theirs });
        }
    }

    proptest! {
        #[test]
        fn fault_37_any_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(open(&bytes).is_err());
        }
    }
}
