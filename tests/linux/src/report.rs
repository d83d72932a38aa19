//! What the outer guest's console says of each scenario, as lines: both sides of it.

use std::fmt::Display;

const BEGIN: &str = "@lab begin ";
const DONE: &str = "@lab done ";
const FAILED: &str = "@lab failed ";

/// What became of a scenario.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Its name.
    pub scenario: String,
    /// Why it failed.
    pub failure: Option<String>,
    /// What was printed while it ran.
    pub log: String,
}

/// The line before everything that a scenario prints.
#[must_use]
pub fn begin(scenario: &str) -> String {
    format!("{BEGIN}{scenario}")
}

/// The line behind it.
#[must_use]
pub fn end(scenario: &str, result: &Result<(), impl Display>) -> String {
    match result {
        Ok(()) => format!("{DONE}{scenario}"),
        Err(why) => format!(
            "{FAILED}{scenario}: {}",
            why.to_string().replace('\n', " | ")
        ),
    }
}

/// The outcome of each of `scenarios`, one that the console does not know included.
#[must_use]
pub fn read(console: &str, scenarios: &[&str]) -> Vec<Outcome> {
    scenarios
        .iter()
        .map(|name| outcome(console, name))
        .collect()
}

fn outcome(console: &str, scenario: &str) -> Outcome {
    let mut log = String::new();
    let mut running = false;
    let mut failure = Some("it has not run; this is all that the outer guest said".to_owned());
    for line in console.lines().map(|line| line.trim_end_matches('\r')) {
        if line == begin(scenario) {
            running = true;
            failure = Some("it has not ended".into());
            log.clear();
        } else if running && line == end(scenario, &Ok::<_, String>(())) {
            failure = None;
            break;
        } else if running
            && let Some(rest) = line.strip_prefix(FAILED)
            && let Some(why) = rest.strip_prefix(scenario)
        {
            failure = Some(why.trim_start_matches(": ").into());
            break;
        } else if running || failure.is_some() {
            log += line;
            log.push('\n');
        }
    }
    Outcome {
        scenario: scenario.into(),
        failure,
        log,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_scenario_gets_its_lines() {
        let lines = [
            "hello".to_owned(),
            begin("good"),
            "one".into(),
            end("good", &Ok::<_, String>(())),
            begin("bad"),
            "two\r".into(),
            end("bad", &Err("no\nway")),
            begin("cut"),
            "three".into(),
        ];
        let outcomes = read(&lines.join("\r\n"), &["good", "bad", "cut", "absent"]);
        let found: Vec<_> = outcomes
            .iter()
            .map(|o| (o.failure.as_deref(), o.log.as_str()))
            .collect();
        assert_eq!(found[0], (None, "one\n"));
        assert_eq!(found[1], (Some("no | way"), "two\n"));
        assert_eq!(found[2], (Some("it has not ended"), "three\n"));
        assert!(
            found[3]
                .0
                .is_some_and(|why| why.starts_with("it has not run"))
        );
        assert!(found[3].1.contains("hello"));
    }
}
