//! The wall clock.

use offshoot_protocol::agent::{ErrorCode, Refusal};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::failure::{Doing, refusal};

const SECOND: u64 = 1_000_000_000;
/// A clock that is off by less is left alone: the message took about as long.
const CLOSE: u64 = 1_000_000;

/// Nanoseconds since 1970; 0 before that.
pub(crate) fn unix_ns() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    let nanos = u64::try_from(now.tv_nsec).unwrap_or_default();
    seconds.saturating_mul(SECOND).saturating_add(nanos)
}

/// Sets the clock, and says whether that was needed.
pub(crate) fn step(unix_ns: u64) -> Result<bool, Refusal> {
    if !is_off(self::unix_ns(), unix_ns) {
        return Ok(false);
    }
    let out_of_range = |_| refusal(ErrorCode::Invalid, "the time");
    let time = Timespec {
        tv_sec: i64::try_from(unix_ns / SECOND).map_err(out_of_range)?,
        tv_nsec: i64::try_from(unix_ns % SECOND).map_err(out_of_range)?,
    };
    clock_settime(ClockId::Realtime, time).doing("setting the clock")?;
    Ok(true)
}

fn is_off(now: u64, right: u64) -> bool {
    now.abs_diff(right) >= CLOSE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_stepped_either_way_when_it_is_off() {
        let now = unix_ns();
        assert!(
            !is_off(now, now) && !is_off(now, now + CLOSE - 1) && !is_off(now, now - CLOSE + 1)
        );
        assert!(is_off(now, now + CLOSE) && is_off(now, now - CLOSE) && is_off(now, 0));
    }

    #[test]
    fn a_right_clock_is_left_alone() {
        assert_eq!(step(unix_ns()), Ok(false));
    }
}
