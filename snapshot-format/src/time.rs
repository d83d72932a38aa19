//! Points in time as a snapshot holds them.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// Milliseconds since 1970-01-01T00:00:00Z, before the year 10000. Shown as RFC 3339 in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(u64);

/// The first millisecond of the year 10000, which RFC 3339 cannot express.
const END: u64 = 253_402_300_800_000;
const MS_PER_DAY: u64 = 86_400_000;

impl Timestamp {
    /// From milliseconds since 1970; `None` from the year 10000 on.
    #[must_use]
    pub fn from_unix_ms(ms: u64) -> Option<Self> {
        (ms < END).then_some(Self(ms))
    }

    /// The present time by the host's clock; a clock that is before 1970 counts as 1970.
    #[must_use]
    pub fn now() -> Self {
        let ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
        Self(ms.min(END.saturating_sub(1)))
    }

    /// Milliseconds since 1970.
    #[must_use]
    pub fn unix_ms(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = civil(self.0.div_euclid(MS_PER_DAY));
        let ms = self.0.rem_euclid(MS_PER_DAY);
        let (hour, minute) = (ms / 3_600_000, ms / 60_000 % 60);
        let (second, ms) = (ms / 1000 % 60, ms % 1000);
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z"
        )
    }
}

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the proleptic Gregorian calendar. `days`
/// is under 3 million here, so nothing overflows.
#[expect(
    clippy::arithmetic_side_effects,
    reason = "bounded by the type's invariant: days before the year 10000"
)]
fn civil(days: u64) -> (u64, u64, u64) {
    // Years are counted from 1st March, so that the leap day is a year's last; an era is 400 years.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_rfc_3339() {
        // Computed with `date -u -d @… +%FT%TZ`.
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (1_732_226_276_123, "2024-11-21T21:57:56.123Z"),
            (END - 1, "9999-12-31T23:59:59.999Z"),
        ] {
            let time = Timestamp::from_unix_ms(ms).map(|t| t.to_string());
            assert_eq!(time.as_deref(), Some(text));
        }
        assert_eq!(Timestamp::from_unix_ms(END), None);
    }
}
