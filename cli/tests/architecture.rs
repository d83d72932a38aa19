//! Keeps the arrows between the workspace's rooms (docs/architecture.md).

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Which rooms a room may depend on. What is reached through several arrows counts as allowed
/// only where it stands here.
const ARROWS: [(&str, &[&str]); 11] = [
    ("offshoot-snapshot-format", &[]),
    ("offshoot-storage", &[]),
    ("offshoot-protocol", &[]),
    ("offshoot-pilot", &["offshoot-protocol"]),
    ("offshoot-agent", &["offshoot-protocol"]),
    ("offshoot-agent-image", &[]),
    ("offshoot", &["offshoot-protocol"]),
    (
        "offshoot-devices",
        &["offshoot-snapshot-format", "offshoot-storage"],
    ),
    (
        "offshoot-vmm",
        &[
            "offshoot-devices",
            "offshoot-snapshot-format",
            "offshoot-storage",
        ],
    ),
    (
        "offshoot-cli",
        &[
            "offshoot-devices",
            "offshoot-pilot",
            "offshoot-protocol",
            "offshoot-snapshot-format",
            "offshoot-storage",
            "offshoot-vmm",
        ],
    ),
    (
        "offshoot-lab",
        &[
            "offshoot",
            "offshoot-agent-image",
            "offshoot-devices",
            "offshoot-snapshot-format",
            "offshoot-storage",
            "offshoot-vmm",
        ],
    ),
];

/// Rooms that only tests of another room may use besides: what runs in guests.
const TEST_ONLY: [&str; 3] = [
    "offshoot-agent-image",
    "offshoot-pilot",
    "offshoot-protocol",
];

/// Rooms that forbid unsafe code altogether, and their crate roots.
const SAFE_ROOTS: [&str; 4] = [
    "snapshot-format/src/lib.rs",
    "guest/protocol/src/lib.rs",
    "sandbox/src/lib.rs",
    "cli/src/main.rs",
];

fn metadata() -> serde_json::Value {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON")
}

#[test]
fn rooms_depend_only_along_the_arrows() {
    let allowed: BTreeMap<_, _> = ARROWS.into_iter().collect();
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let rooms: BTreeSet<_> = packages
        .iter()
        .map(|room| room["name"].as_str().unwrap())
        .collect();
    let mut wrong = Vec::new();
    for package in packages {
        let room = package["name"].as_str().unwrap();
        let Some(arrows) = allowed.get(room) else {
            wrong.push(format!(
                "{room} is a new room: say in this test what it may depend on"
            ));
            continue;
        };
        for dependency in package["dependencies"].as_array().unwrap() {
            let target = dependency["name"].as_str().unwrap();
            // A room may have itself as a dev-dependency, to switch on a feature for its tests.
            let for_tests =
                dependency["kind"] == "dev" && (TEST_ONLY.contains(&target) || target == room);
            if rooms.contains(target) && !arrows.contains(&target) && !for_tests {
                wrong.push(format!("{room} -> {target}"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "arrows that the architecture does not have: {wrong:#?}"
    );
    let missing: Vec<_> = allowed
        .keys()
        .filter(|room| !rooms.contains(*room))
        .collect();
    assert!(missing.is_empty(), "rooms that are gone: {missing:?}");
}

#[test]
fn rooms_that_forbid_unsafe_code_say_so() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    for path in SAFE_ROOTS {
        let source = std::fs::read_to_string(format!("{root}/{path}")).unwrap();
        assert!(source.contains("#![forbid(unsafe_code)]"), "{path}");
    }
}

/// `docs/dependencies.md` has a row for every direct dependency, and for no other.
#[test]
fn every_direct_dependency_is_explained() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let direct: BTreeSet<_> = packages
        .iter()
        .flat_map(|package| package["dependencies"].as_array().unwrap())
        .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
        .filter(|name| name != "offshoot" && !name.starts_with("offshoot-"))
        .collect();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/dependencies.md");
    let table = std::fs::read_to_string(path).unwrap();
    let explained: BTreeSet<_> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(name, _)| name.to_owned())
        .collect();
    let unexplained: Vec<_> = direct.difference(&explained).collect();
    let stale: Vec<_> = explained.difference(&direct).collect();
    assert!(
        unexplained.is_empty() && stale.is_empty(),
        "docs/dependencies.md lacks {unexplained:?} and has rows for {stale:?}, which nothing uses"
    );
}

/// The `qcow2-rs` crate asks for `log` with every level switched off in release builds, and cargo gives a
/// feature to the whole program: who embeds Offshoot would lose all logging. So nobody gets it without
/// asking for it.
#[test]
fn default_builds_leave_logging_alone() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
    let name = |node: &serde_json::Value| {
        let id = &node["id"];
        let packages = metadata["packages"].as_array().unwrap();
        let package = packages.iter().find(|package| package["id"] == *id);
        package.unwrap()["name"].as_str().unwrap().to_owned()
    };
    for node in nodes {
        let name = name(node);
        assert_ne!(name, "qcow2-rs", "it is in the default build");
        if name == "log" || name == "tracing" {
            for feature in node["features"].as_array().unwrap() {
                let feature = feature.as_str().unwrap();
                assert!(!feature.contains("max_level"), "{name}: {feature}");
            }
        }
    }
}

/// Every link from one page of the book (or the README) to a file of the repository finds it.
#[test]
fn links_of_the_book_lead_somewhere() {
    let root = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let mut pages = vec![root.join("README.md"), root.join("fuzz/README.md")];
    for entry in std::fs::read_dir(root.join("docs")).unwrap() {
        pages.push(entry.unwrap().path());
    }
    let mut broken = Vec::new();
    for page in pages {
        let text = std::fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap();
            let is_file = !target.is_empty() && !target.contains(':') && !target.contains(' ');
            if is_file && !page.parent().unwrap().join(target).exists() {
                broken.push(format!("{}: {target}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}
