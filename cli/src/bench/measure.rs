//! Samples of one metric, and the line that reports them.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

/// What every line of `offshoot bench --json` says: one metric of one run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Line {
    /// The bench: `boot`, `restore`, ….
    pub(crate) bench: &'static str,
    /// What was measured.
    pub(crate) metric: &'static str,
    /// The storage backend, where disks are part of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) backend: Option<String>,
    /// The guest's RAM, where there is a guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ram_mib: Option<u64>,
    #[serde(flatten)]
    pub(crate) figures: Figures,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = format!("{} {}", self.bench, self.metric);
        let backend = self.backend.as_deref().unwrap_or("");
        write!(f, "{name:24} {backend:8}")?;
        match &self.figures {
            Figures::Times(times) => {
                write!(f, " n {:5}", times.n)?;
                let figures = [
                    ("p50", times.p50_us),
                    ("p95", times.p95_us),
                    ("p99", times.p99_us),
                    ("min", times.min_us),
                    ("max", times.max_us),
                ];
                figures
                    .into_iter()
                    .try_for_each(|(name, us)| write!(f, "  {name} {:9.3} ms", us / 1e3))
            }
            Figures::Value { n, value, unit } => write!(f, " n {n:5}  {value:.0} {unit}"),
        }
    }
}

/// The figures themselves.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub(crate) enum Figures {
    /// A time, sampled `n` times.
    Times(Times),
    /// A single value that is not a time.
    Value {
        /// How many samples the value is the median of.
        n: usize,
        /// The value.
        value: f64,
        /// Its unit.
        unit: &'static str,
    },
}

/// The distribution of a time, in microseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Times {
    pub(crate) n: usize,
    pub(crate) p50_us: f64,
    pub(crate) p95_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) min_us: f64,
    pub(crate) max_us: f64,
}

impl Times {
    /// The distribution of `samples`; percentiles by the nearest-rank method. `None` without samples.
    pub(crate) fn of(samples: &[Duration]) -> Option<Self> {
        let mut sorted: Vec<f64> = samples
            .iter()
            .map(|sample| sample.as_secs_f64() * 1e6)
            .collect();
        sorted.sort_by(f64::total_cmp);
        let rank = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).copied()
        };
        Some(Self {
            n: sorted.len(),
            p50_us: rank(50)?,
            p95_us: rank(95)?,
            p99_us: rank(99)?,
            min_us: sorted.first().copied()?,
            max_us: sorted.last().copied()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(values: impl IntoIterator<Item = u64>) -> Vec<Duration> {
        values.into_iter().map(Duration::from_micros).collect()
    }

    #[test]
    fn percentiles_are_samples_of_the_nearest_rank() {
        let times = Times::of(&micros((1..=200).rev())).unwrap();
        let figures = (times.n, times.p50_us, times.p95_us, times.p99_us);
        assert_eq!(figures, (200, 100.0, 190.0, 198.0));
        assert_eq!((times.min_us, times.max_us), (1.0, 200.0));
    }

    #[test]
    fn one_sample_is_every_percentile_and_none_is_no_distribution() {
        let times = Times::of(&micros([7])).unwrap();
        assert_eq!((times.p50_us, times.p99_us, times.max_us), (7.0, 7.0, 7.0));
        assert_eq!(Times::of(&[]), None);
    }

    #[test]
    fn a_line_is_one_flat_json_object() {
        let line = Line {
            bench: "restore",
            metric: "first_exit",
            backend: Some("copy".into()),
            ram_mib: Some(256),
            figures: Figures::Times(Times::of(&micros([1, 2, 3])).unwrap()),
        };
        let json = serde_json::to_string(&line).unwrap();
        assert_eq!(
            json,
            r#"{"bench":"restore","metric":"first_exit","backend":"copy","ram_mib":256,"n":3,"p50_us":2.0,"p95_us":3.0,"p99_us":3.0,"min_us":1.0,"max_us":3.0}"#
        );
    }
}
