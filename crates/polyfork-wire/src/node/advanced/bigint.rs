//! Whole numbers of any size, as they travel; nothing is calculated with them here.

use std::fmt;

/// A JavaScript `bigint`: a sign and a magnitude. Zero has no sign.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct BigInt {
    negative: bool,
    /// Least significant first; the last is not zero.
    digits: Vec<u64>,
}

impl BigInt {
    /// The number with this sign and magnitude, least significant digit first.
    #[must_use]
    pub fn new(negative: bool, mut digits: Vec<u64>) -> Self {
        let length = digits.iter().rposition(|digit| *digit != 0).map_or(0, |last| last + 1);
        digits.truncate(length);
        Self { negative: negative && length > 0, digits }
    }

    pub(super) fn from_bytes(negative: bool, bytes: &[u8]) -> Self {
        let digit = |bytes: &[u8]| {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(whole)
        };
        Self::new(negative, bytes.chunks(8).map(digit).collect())
    }

    /// Whether it is below zero.
    #[must_use]
    pub fn is_negative(&self) -> bool {
        self.negative
    }

    /// The magnitude, least significant digit first, without leading zeros.
    #[must_use]
    pub fn digits(&self) -> &[u64] {
        &self.digits
    }

    /// The number, if it fits.
    #[must_use]
    pub fn to_u128(&self) -> Option<u128> {
        (!self.negative).then(|| self.magnitude()).flatten()
    }

    /// The number, if it fits.
    #[must_use]
    pub fn to_i128(&self) -> Option<i128> {
        let magnitude = self.magnitude()?;
        if self.negative {
            0_i128.checked_sub_unsigned(magnitude)
        } else {
            i128::try_from(magnitude).ok()
        }
    }

    fn magnitude(&self) -> Option<u128> {
        match *self.digits {
            [] => Some(0),
            [low] => Some(u128::from(low)),
            [low, high] => Some(u128::from(high) << 64 | u128::from(low)),
            _ => None,
        }
    }
}

impl From<u128> for BigInt {
    #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
    fn from(number: u128) -> Self {
        Self::new(false, vec![number as u64, (number >> 64) as u64])
    }
}

impl From<i128> for BigInt {
    fn from(number: i128) -> Self {
        let magnitude = Self::from(number.unsigned_abs());
        Self { negative: number < 0, ..magnitude }
    }
}

impl From<u64> for BigInt {
    fn from(number: u64) -> Self {
        Self::from(u128::from(number))
    }
}

impl From<i64> for BigInt {
    fn from(number: i64) -> Self {
        Self::from(i128::from(number))
    }
}

/// Decimal up to 128 bits. Beyond it is hexadecimal with `0x`, because decimal digits of a hostile number would
/// take quadratic time.
impl fmt::Display for BigInt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.negative {
            f.write_str("-")?;
        }
        if let Some(magnitude) = self.magnitude() {
            return magnitude.fmt(f);
        }
        let mut digits = self.digits.iter().rev();
        write!(f, "0x{:x}", digits.next().copied().unwrap_or(0))?;
        digits.try_for_each(|digit| write!(f, "{digit:016x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_both_ways() {
        for number in [0, 1, -1, i128::from(i64::MIN), i128::MAX, i128::MIN] {
            let big = BigInt::from(number);
            assert_eq!((big.to_i128(), big.to_string()), (Some(number), number.to_string()));
        }
        assert_eq!(BigInt::from(u128::MAX).to_u128(), Some(u128::MAX));
        assert_eq!(BigInt::from(u128::MAX).to_i128(), None);
        assert_eq!(BigInt::from(-1_i64).to_u128(), None);
    }

    #[test]
    fn zeros_in_front_and_the_sign_of_zero_go_away() {
        assert_eq!(BigInt::new(true, vec![0, 0]), BigInt::default());
        assert_eq!(BigInt::from_bytes(true, &[5]), BigInt::from(-5_i64));
        let large = BigInt::new(true, vec![1, 0, 0xab, 0]);
        assert_eq!(large.to_string(), "-0xab00000000000000000000000000000001");
        assert_eq!((large.to_i128(), large.digits().len()), (None, 3));
    }
}
