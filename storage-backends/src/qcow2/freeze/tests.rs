//! Kills a process at each step of a freeze.

/// Aborts the process when the environment names this step.
pub(super) fn crash_if_asked(step: u32) {
    if std::env::var("OFFSHOOT_TEST_CRASH_AT").is_ok_and(|s| s == step.to_string()) {
        std::process::abort();
    }
}
