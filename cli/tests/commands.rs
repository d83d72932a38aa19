//! The command as users run it: the demo, the bench's output, and what it says when it cannot.

use std::process::{Command, Output};

/// The command, with a working directory that must be empty afterwards.
struct Offshoot {
    dir: tempfile::TempDir,
}

impl Offshoot {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
        // Everything that it makes for itself is made here.
        command.env("TMPDIR", self.dir.path()).args(args);
        let output = command.output().unwrap();
        let left: Vec<_> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert!(left.is_empty(), "{args:?} left {left:?}");
        output
    }

    /// Runs what must fail, and returns what it said.
    fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
        let said = text(&output.stderr);
        assert!(said.starts_with("offshoot: "), "{said}");
        said
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Whether guests can run here, or a line that says that the test is skipped.
fn kvm() -> bool {
    let able = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !able {
        skipped("no access to /dev/kvm");
    }
    able
}

#[allow(clippy::print_stderr, reason = "a skipped test says so")]
fn skipped(why: &str) {
    eprintln!("skipped: {why}");
}

#[test]
fn the_demo_tells_the_whole_story() {
    if !kvm() {
        return;
    }
    let args = ["demo", "--forks", "3", "--ram", "64", "--cpus", "2"];
    let backends = ["--backend", "copy", "--backend", "qcow2"];
    let output = Offshoot::new().run(&[&args[..], &backends].concat());
    assert!(output.status.success(), "{output:?}");
    let said = text(&output.stdout);
    for part in [
        "copy: a guest of 64 MiB and 3 copies of it: each continued exactly",
        "qcow2: a guest of 64 MiB and 3 copies of it: each continued exactly",
        "boot to the first serial byte",
        "copy: call to an answer over vsock (median)",
    ] {
        assert!(said.contains(part), "{said}");
    }
}

/// The lines of a bench, as metric and object.
fn bench(args: &[&str]) -> Vec<(String, serde_json::Value)> {
    let args = [&["bench"], args, &["--backend", "qcow2", "--json"]].concat();
    let output = Offshoot::new().run(&args);
    assert!(output.status.success(), "{output:?}");
    let lines = text(&output.stdout);
    let objects = lines.lines().map(|line| {
        let object: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(object["bench"], args[1]);
        assert_eq!(object["backend"], "qcow2");
        (object["metric"].as_str().unwrap().to_owned(), object)
    });
    objects.collect()
}

fn is_a_time(object: &serde_json::Value, n: u64) {
    assert_eq!(object["n"], n, "{object}");
    let figure = |name: &str| object[name].as_f64().unwrap();
    let all = ["min_us", "p50_us", "p95_us", "p99_us", "max_us"].map(figure);
    assert!(all[0] > 0.0 && all.is_sorted(), "{object}");
}

#[test]
fn a_bench_prints_one_object_a_metric() {
    if !kvm() {
        return;
    }
    for (args, times, values) in [
        (
            &["boot", "--n", "2", "--ram", "64"][..],
            &["first_byte", "vsock_reply"][..],
            &[][..],
        ),
        (
            &["restore", "--n", "2", "--idle", "2", "--ram", "64"],
            &["load", "first_exit", "vsock_reply"],
            &["idle_pss", "idle_total"],
        ),
        (
            &["snapshot", "--n", "2", "--ram", "64"],
            &["source_pause", "total"],
            &["size"],
        ),
    ] {
        let lines = bench(args);
        let of = |metric: &str| {
            let found = lines.iter().find(|(name, _)| name == metric);
            &found
                .unwrap_or_else(|| panic!("{args:?} has no {metric}"))
                .1
        };
        for metric in times {
            is_a_time(of(metric), 2);
            assert_eq!(of(metric)["ram_mib"], 64);
        }
        for metric in values {
            assert!(of(metric)["value"].as_f64().is_some());
            assert_eq!(of(metric)["unit"], "KiB");
        }
    }
}

#[test]
fn a_bench_of_disks_needs_no_kvm() {
    let lines = bench(&["disk-fork", "--n", "3", "--size", "1", "--data", "0"]);
    let metrics: Vec<_> = lines.iter().map(|(metric, _)| metric.as_str()).collect();
    assert_eq!(metrics, ["freeze", "fork"]);
    for (_, object) in &lines {
        is_a_time(object, 3);
    }
}

#[test]
fn a_backend_that_cannot_be_had_is_refused_by_name() {
    let offshoot = Offshoot::new();
    let said = offshoot.fails(&["bench", "disk-fork", "--backend", "floppy"]);
    assert!(said.contains("floppy") && said.contains("qcow2"), "{said}");
    let said = offshoot.fails(&["bench", "disk-fork", "--dir", "/nowhere"]);
    assert!(
        said.contains("/nowhere") && said.contains("No such file"),
        "{said}"
    );
    // /proc is a file system that can clone nothing, and make nothing.
    let said = offshoot.fails(&["bench", "disk-fork", "--dir", "/proc"]);
    assert!(said.contains("/proc"), "{said}");
}

/// Runs the demo where `/dev` holds nothing but what `prepare` puts there and a copy of the
/// program, as the user that `become` makes.
fn with_other_dev(prepare: &str, become_user: &str) -> Option<String> {
    let script = format!(
        "mount -t tmpfs none /dev && cp \"$0\" /dev/offshoot && {prepare} && \
         exec {become_user} /dev/offshoot demo"
    );
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .arg(env!("CARGO_BIN_EXE_offshoot"))
        .output();
    match output {
        Ok(output) if text(&output.stderr).starts_with("offshoot:") => {
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            Some(text(&output.stderr))
        }
        other => {
            skipped(&format!(
                "hosts without KVM: no namespace of our own: {other:?}"
            ));
            None
        }
    }
}

#[test]
fn a_host_without_kvm_is_told_what_to_do() {
    if let Some(said) = with_other_dev("true", "") {
        assert!(said.contains("there is no /dev/kvm here"), "{said}");
        assert!(said.contains("because: "), "{said}");
    }
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups";
    if let Some(said) = with_other_dev("mknod -m 600 /dev/kvm c 10 232", nobody) {
        assert!(said.contains("no permission to open /dev/kvm"), "{said}");
    }
    if let Some(said) = with_other_dev("mknod -m 666 /dev/kvm c 1 3", "") {
        assert!(said.contains("is it the real device?"), "{said}");
    }
}

#[test]
fn a_full_directory_fails_the_demo_and_nothing_stays() {
    if !kvm() {
        return;
    }
    let offshoot = Offshoot::new();
    let small = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=8m", "none"])
        .arg(small.path())
        .output()
        .is_ok_and(|output| output.status.success());
    if !mounted {
        skipped("a full directory: no tmpfs can be mounted here");
        return;
    }
    let dir = small.path().to_str().unwrap();
    let said = offshoot.fails(&["demo", "--ram", "64", "--backend", "copy", "--dir", dir]);
    let left = std::fs::read_dir(small.path()).unwrap().count();
    let unmounted = Command::new("umount").arg(small.path()).status().unwrap();
    assert_eq!(left, 0, "the working directory stays");
    assert!(unmounted.success(), "something still uses it");
    assert!(said.contains("the demo failed on copy"), "{said}");
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut demo = Command::new(env!("CARGO_BIN_EXE_offshoot"))
        .env("TMPDIR", dir.path())
        .args(["demo", "--forks", "256", "--ram", "64", "--backend", "copy"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let entries = || std::fs::read_dir(dir.path()).unwrap().count();
    while entries() < 2 {
        assert!(demo.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    std::thread::sleep(std::time::Duration::from_millis(300));
    let pid = rustix::process::Pid::from_child(&demo);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let status = demo.wait().unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(2),
        "{status}"
    );
    assert_eq!(entries(), 0);
}
