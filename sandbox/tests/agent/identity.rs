use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use offshoot::ErrorKind;
use offshoot::agent::{
    Address, Agent, Command, EnvVar, Event, Generation, Id, Identity, Link, Mac, Report, Route,
    Settings, StepKind, StepResult, WriteOptions,
};

use crate::rig::{Rig, eventually, in_namespaces, is_alive, is_root, skipped, soon};

/// An agent with names, network and `/etc` of its own.
fn guest() -> Option<Rig> {
    if !is_root() {
        skipped("an agent in namespaces (not root)");
        return None;
    }
    // As process 1 the agent mounts over what is no mount yet, the test's own directory included
    // where that lies in one of these.
    let script = "for d in /tmp /run; do mount --bind $d $d; done; mount -t tmpfs none /etc; mkdir -p /etc/offshoot/fork.d; \
                  echo old > /etc/hostname; hostname old; ip tuntap add eth7 mode tap; \
                  ip addr add 10.9.9.9/24 dev eth7; exec \"$0\" --listen \"$1\"";
    Some(Rig::start(|listen| in_namespaces(script, listen)))
}

fn settings() -> Settings {
    Settings {
        hostname: None,
        machine_id: None,
        env: Vec::new(),
        links: Vec::new(),
        resolvers: Vec::new(),
    }
}

fn identity(generation: u8) -> Identity {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    Identity {
        generation: Generation([generation; 16]),
        unix_ns: now.as_nanos() as u64,
        seed: vec![generation; 64],
        settings: settings(),
        hook_limit_ms: 0,
    }
}

fn sh(agent: &Agent, script: &str) -> String {
    let output = agent
        .run(&Command::shell(script), b"", 1 << 20, soon())
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.exit.success(),
        "{script}: {text} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

fn hook(agent: &Agent, name: &str, script: &str) {
    let options = WriteOptions {
        mode: Some(0o755),
        ..WriteOptions::default()
    };
    let path = format!("/etc/offshoot/fork.d/{name}");
    let mut text = script.as_bytes();
    agent.write_from(path, &options, &mut text, soon()).unwrap();
}

fn results(report: &Report) -> Vec<(StepKind, StepResult)> {
    report
        .steps
        .iter()
        .map(|step| (step.kind, step.result))
        .collect()
}

#[test]
fn a_new_identity_is_taken_in_order_and_reported() {
    let Some(rig) = guest() else { return };
    let agent = &rig.agent;
    hook(
        agent,
        "20-second",
        "#!/bin/sh\necho \"two $OFFSHOOT_GENERATION $COLOUR\" >> /etc/log\n",
    );
    hook(
        agent,
        "10-first",
        "#!/bin/sh\necho \"one $(hostname)\" >> /etc/log\n",
    );
    hook(agent, "30-fails", "#!/bin/sh\nexit 3\n");
    let mut wanted = identity(0xab);
    wanted.settings = Settings {
        hostname: Some(b"fork-1".to_vec()),
        machine_id: Some(Id([0x5a; 16])),
        env: vec![EnvVar {
            name: b"COLOUR".to_vec(),
            value: Some(b"green".to_vec()),
        }],
        links: vec![Link {
            name: Vec::new(),
            mac: Some(Mac([2, 0, 0, 1, 2, 3])),
            mtu: Some(1400),
            replace: true,
            addresses: vec![
                Address {
                    ip: [10, 1, 2, 3].into(),
                    prefix: 24,
                },
                Address {
                    ip: [0xfd00, 0, 0, 0, 0, 0, 0, 3].into(),
                    prefix: 64,
                },
            ],
            routes: vec![
                Route {
                    to: Address {
                        ip: [0, 0, 0, 0].into(),
                        prefix: 0,
                    },
                    gateway: Some([10, 1, 2, 1].into()),
                    metric: Some(50),
                },
                Route {
                    to: Address {
                        ip: [192, 168, 7, 0].into(),
                        prefix: 24,
                    },
                    gateway: None,
                    metric: None,
                },
            ],
        }],
        resolvers: vec![
            [10, 1, 2, 1].into(),
            [0xfd00u16, 0, 0, 0, 0, 0, 0, 1].into(),
        ],
    };
    let report = agent.identify(&wanted, soon()).unwrap();
    assert_eq!(report.generation, wanted.generation);
    use StepKind::{Clock, Entropy, Environment, Hook, Hostname, Listen, MachineId, Resolvers};
    use StepResult::{Done, Failed, Nothing};
    assert_eq!(
        results(&report),
        [
            (Entropy, Done),
            // The clock of this machine is right already.
            (Clock, Nothing),
            (Hostname, Done),
            (MachineId, Done),
            (Environment, Done),
            (StepKind::Link, Done),
            (Resolvers, Done),
            (Listen, Done),
            (Hook, Done),
            (Hook, Done),
            (Hook, Failed),
        ],
        "{report:#?}"
    );
    let last = report.steps.last().unwrap();
    assert_eq!(
        (last.subject.as_slice(), last.detail.as_slice()),
        (b"30-fails".as_slice(), b"exit code 3".as_slice())
    );
    let sum: u64 = report.steps.iter().map(|step| step.micros).sum();
    assert!(
        sum <= report.micros && report.micros < 10_000_000,
        "{sum} of {}",
        report.micros
    );

    let agent = &agent.of_generation(wanted.generation);
    assert_eq!(sh(agent, "hostname; cat /etc/hostname"), "fork-1\nfork-1\n");
    assert_eq!(
        sh(agent, "cat /etc/machine-id"),
        format!("{}\n", "5a".repeat(16))
    );
    assert_eq!(sh(agent, "echo $COLOUR"), "green\n");
    let generation = "ab".repeat(16);
    assert_eq!(
        sh(agent, "cat /etc/log"),
        format!("one fork-1\ntwo {generation} green\n")
    );
    assert_eq!(
        sh(agent, "cat /etc/resolv.conf"),
        "nameserver 10.1.2.1\nnameserver fd00::1\n"
    );
    let links = sh(agent, "ip -o link show eth7");
    assert!(
        links.contains("02:00:00:01:02:03") && links.contains("mtu 1400"),
        "{links}"
    );
    let addresses = sh(agent, "ip -o addr show eth7");
    assert!(
        addresses.contains("10.1.2.3/24") && addresses.contains("fd00::3/64"),
        "{addresses}"
    );
    assert!(!addresses.contains("10.9.9.9"), "{addresses}");
    let routes = sh(agent, "ip route");
    assert!(
        routes.contains("default via 10.1.2.1 dev eth7") && routes.contains("metric 50"),
        "{routes}"
    );
    assert!(routes.contains("192.168.7.0/24 dev eth7"), "{routes}");

    // Asked again it says the same, and does nothing.
    assert_eq!(agent.identify(&wanted, soon()).unwrap(), report);
    assert_eq!(sh(agent, "wc -l < /etc/log"), "2\n");
}

#[test]
fn nothing_is_answered_in_the_name_of_another_generation() {
    let Some(rig) = guest() else { return };
    let first = rig.agent.of_generation(Generation([1; 16]));
    let second = rig.agent.of_generation(Generation([2; 16]));
    assert_eq!(first.ping(soon()).unwrap_err().kind(), ErrorKind::NotReady);
    rig.agent.identify(&identity(1), soon()).unwrap();
    first.ping(soon()).unwrap();
    // As if this were a copy: the host means the second, and the agent is still the first.
    assert_eq!(second.ping(soon()).unwrap_err().kind(), ErrorKind::NotReady);
    let refused = second.start(&Command::shell("touch /etc/done"), soon());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::NotReady);
    assert!(sh(&first, "ls /etc/done 2>&1 || true").contains("No such"));
    rig.agent.identify(&identity(2), soon()).unwrap();
    second.ping(soon()).unwrap();
    assert_eq!(first.ping(soon()).unwrap_err().kind(), ErrorKind::NotReady);
}

#[test]
fn requests_wait_while_an_identity_is_taken() {
    let Some(rig) = guest() else { return };
    hook(
        &rig.agent,
        "slow",
        "#!/bin/sh\nsleep 0.7\necho done > /etc/slow\n",
    );
    let taking = thread::spawn({
        let agent = rig.agent.clone();
        move || agent.identify(&identity(1), soon()).unwrap()
    });
    thread::sleep(Duration::from_millis(300));
    // Neither of these is answered before the hook is through; one without a generation included.
    for agent in [
        rig.agent.clone(),
        rig.agent.of_generation(Generation([1; 16])),
    ] {
        assert_eq!(sh(&agent, "cat /etc/slow"), "done\n");
    }
    taking.join().unwrap();
}

#[test]
fn commands_live_on_in_a_copy_and_their_old_clients_are_gone() {
    let Some(rig) = guest() else { return };
    let process = rig
        .agent
        .start(&Command::shell("echo a; read x; echo b $x").input(), soon())
        .unwrap();
    assert_eq!(
        process.next(soon()).unwrap(),
        Event::Stdout(b"a\n".to_vec())
    );
    let file = rig.path("half");
    let writer = thread::spawn({
        let (agent, file) = (rig.agent.clone(), file.clone());
        move || {
            agent.write_from(
                file,
                &WriteOptions::default(),
                &mut std::io::repeat(1),
                soon(),
            )
        }
    });
    thread::sleep(Duration::from_millis(100));
    rig.agent.identify(&identity(1), soon()).unwrap();
    assert_eq!(
        process.next(soon()).unwrap_err().kind(),
        ErrorKind::Disconnected
    );
    assert_eq!(
        writer.join().unwrap().unwrap_err().kind(),
        ErrorKind::Disconnected
    );
    assert!(!file.exists());
    let (joined, info) = rig.agent.attach(process.job(), u64::MAX, soon()).unwrap();
    assert!(info.exit.is_none());
    joined.input().write(b"after\n", soon()).unwrap();
    assert_eq!(
        joined.next(soon()).unwrap(),
        Event::Stdout(b"b after\n".to_vec())
    );
    assert!(matches!(joined.next(soon()).unwrap(), Event::Exited(exit) if exit.success()));
}

#[test]
fn slow_hooks_are_killed_with_their_groups_and_the_rest_is_reported() {
    let Some(rig) = guest() else { return };
    hook(
        &rig.agent,
        "1-hangs",
        "#!/bin/sh\nsleep 1000 & echo $! > /etc/pid; trap '' TERM; sleep 1000\n",
    );
    hook(&rig.agent, "2-late", "#!/bin/sh\ntouch /etc/late\n");
    let mut wanted = identity(1);
    wanted.hook_limit_ms = 300;
    let started = Instant::now();
    let report = rig.agent.identify(&wanted, soon()).unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    let hooks: Vec<_> = report
        .steps
        .iter()
        .filter(|step| step.kind == StepKind::Hook)
        .collect();
    assert_eq!(hooks.len(), 2);
    assert!(
        hooks
            .iter()
            .all(|step| step.result == StepResult::Failed && step.errno == 110)
    );
    // Of the namespace's own numbers: not to be looked up out here.
    let alive = || {
        sh(
            &rig.agent,
            "kill -0 $(cat /etc/pid) 2>/dev/null && echo alive || true",
        )
    };
    eventually("its child is gone", || alive().is_empty());
    assert_eq!(
        sh(&rig.agent, "ls /etc"),
        sh(&rig.agent, "ls /etc | grep -v late")
    );
    assert!(is_alive(&rig.process.id().to_string()));
}

#[test]
fn one_failed_step_does_not_keep_the_others_from_being_done() {
    let Some(rig) = guest() else { return };
    let mut wanted = identity(1);
    wanted.seed = vec![1; 8];
    wanted.settings.hostname = Some(b"bad name!".to_vec());
    wanted.settings.machine_id = Some(Id([1; 16]));
    wanted.settings.links = vec![Link {
        name: b"none0".to_vec(),
        mac: None,
        mtu: None,
        replace: false,
        addresses: Vec::new(),
        routes: Vec::new(),
    }];
    let report = rig.agent.identify(&wanted, soon()).unwrap();
    let by_kind: BTreeMap<_, _> = report
        .steps
        .iter()
        .map(|step| (step.kind as u8, (step.result, step.errno)))
        .collect();
    let of = |kind: StepKind| by_kind[&(kind as u8)];
    assert_eq!(
        of(StepKind::Entropy),
        (StepResult::Failed, 0),
        "too short to be credited"
    );
    assert_eq!(of(StepKind::Hostname), (StepResult::Failed, 0));
    assert_eq!(of(StepKind::MachineId), (StepResult::Done, 0));
    assert_eq!(of(StepKind::Link), (StepResult::Failed, 19));
    assert_eq!(of(StepKind::Listen).0, StepResult::Done);
    assert_eq!(sh(&rig.agent, "hostname"), "old\n");
    let error = rig.agent.identify(&identity(0), soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn settings_change_without_a_fork_too() {
    let Some(rig) = guest() else { return };
    let mut wanted = settings();
    wanted.hostname = Some(b"renamed".to_vec());
    let report = rig.agent.configure(&wanted, soon()).unwrap();
    assert_eq!(report.generation, Generation::NONE);
    assert_eq!(sh(&rig.agent, "hostname"), "renamed\n");
    // A second address beside the first, and the same again.
    for _ in 0..2 {
        let mut wanted = settings();
        wanted.links = vec![Link {
            name: b"eth7".to_vec(),
            mac: None,
            mtu: None,
            replace: false,
            addresses: vec![Address {
                ip: [10, 8, 8, 8].into(),
                prefix: 24,
            }],
            routes: Vec::new(),
        }];
        let report = rig.agent.configure(&wanted, soon()).unwrap();
        assert!(
            report
                .steps
                .iter()
                .all(|step| step.result != StepResult::Failed),
            "{report:?}"
        );
        let addresses = sh(&rig.agent, "ip -o -4 addr show eth7 | wc -l");
        assert_eq!(addresses, "2\n");
    }
}

#[test]
fn ten_generations_follow_each_other() {
    let Some(rig) = guest() else { return };
    for n in 1..=10 {
        let report = rig.agent.identify(&identity(n), soon()).unwrap();
        let listen = report
            .steps
            .iter()
            .find(|step| step.kind == StepKind::Listen)
            .unwrap();
        assert_eq!(listen.result, StepResult::Done, "{report:?}");
        let agent = rig.agent.of_generation(Generation([n; 16]));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| agent.ping(soon()).unwrap());
            }
        });
        if n == 10 {
            println!(
                "a whole identity without hooks: {} us, listening anew {} us",
                report.micros, listen.micros
            );
        }
    }
}

#[test]
fn the_clock_is_set_only_when_it_is_off() {
    if !is_root() {
        return skipped("setting the clock (not root)");
    }
    let rig = Rig::new();
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    rig.agent.set_clock(now.as_nanos() as u64, soon()).unwrap();
    let metrics = rig.agent.metrics(&[], soon()).unwrap();
    let later = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    assert!(metrics.unix_ns >= now.as_nanos() as u64 && metrics.unix_ns <= later.as_nanos() as u64);
    assert!(metrics.memory.total > metrics.memory.available && metrics.memory.available > 0);
    assert!(
        metrics.uptime_ms > 0
            && metrics.cpus > 0
            && metrics.tasks > 1
            && metrics.load_milli.len() == 3
    );
    assert!(metrics.disks[0].path == b"/" && metrics.disks[0].size > 0);
    rig.agent.sync(soon()).unwrap();
}
