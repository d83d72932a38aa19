//! Snapshots on disk, templates, and what is refused.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use offshoot_devices::virtio::balloon::BalloonConfig;
use offshoot_snapshot_format::{
    ManifestParts, RawSnapshot, Section, SnapshotContent, SnapshotId, SnapshotWriter, Timestamp,
    Verify,
};
use offshoot_storage::{Access, LayerName, StorageBackend, VolumeName, copy};
use vm_memory::{Bytes, GuestAddress};

use super::guest::{CELL, Entry, boot, cell, config, host, wait_for};
use crate::arch::VcpuState;
use crate::kvm::Host;
use crate::snapshot::{layout, sections};
use crate::{
    Bindings, DriveBinding, Error, ErrorKind, Machine, MachineState, ModelConfig, Running,
    SaveOptions, Template,
};

const COUNTER: &[u8] = &[
    0xff, 0x05, 0x00, 0x00, 0x18, 0x00, // inc dword [0x180000]
    0xeb, 0xf8, // jmp -8
];

/// A running counter that has come to something.
fn counter(host: &Arc<Host>) -> Running {
    let mut machine = boot(host, COUNTER, Entry::Pvh);
    let memory = Arc::clone(machine.paused().memory());
    let running = machine.start().unwrap();
    wait_for(&memory, CELL, 100);
    running
}

/// Nothing of a half-made snapshot.
fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).unwrap().next().is_none()
}

#[test]
fn a_snapshot_is_forked_many_times() {
    let Some(host) = host() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut running = counter(&host);
    let paused = running.pause().unwrap();
    let at = cell(paused.memory(), CELL);
    paused
        .memory()
        .ram()
        .write_obj(77_u64, GuestAddress(0x20_0000))
        .unwrap();
    let saved = paused
        .save(dir.path(), SaveOptions::new().unwrap())
        .unwrap();
    paused.resume().unwrap();
    assert!(saved.layers.is_empty());
    running.stop().wait();

    let raw = RawSnapshot::open(&saved.path).unwrap();
    assert_eq!(raw.manifest().id(), saved.id);
    let template = Template::load(&host, &raw, Verify::Eager).unwrap();
    drop(raw);
    assert_eq!(template.origin().unwrap().id, saved.id);
    let mut forks = Vec::new();
    for _ in 0..5 {
        let mut machine = template.fork(Bindings::default()).unwrap();
        let memory = Arc::clone(machine.paused().memory());
        assert_eq!(cell(&memory, CELL), at);
        assert_eq!(cell(&memory, GuestAddress(0x20_0000)), 77);
        forks.push((machine.start().unwrap(), memory));
    }
    for (_, memory) in &forks {
        wait_for(memory, CELL, at + 50);
    }
    // A snapshot of a fork holds what the fork did since.
    let (mut fork, memory) = forks.pop().unwrap();
    let paused = fork.pause().unwrap();
    let later = cell(&memory, CELL);
    let again = paused
        .save(dir.path(), SaveOptions::new().unwrap())
        .unwrap();
    let raw = RawSnapshot::open(&again.path).unwrap();
    let template = Template::load(&host, &raw, Verify::Eager).unwrap();
    let mut machine = template.fork(Bindings::default()).unwrap();
    assert_eq!(cell(machine.paused().memory(), CELL), later);
}

#[test]
fn a_template_of_a_living_machine_needs_no_disk() {
    let Some(host) = host() else { return };
    let mut running = counter(&host);
    let paused = running.pause().unwrap();
    let at = cell(paused.memory(), CELL);
    let template = Template::from_paused(&paused).unwrap();
    drop(paused);
    let mut machine = template.fork(Bindings::default()).unwrap();
    let memory = Arc::clone(machine.paused().memory());
    assert_eq!(cell(&memory, CELL), at);
    let _running = machine.start().unwrap();
    wait_for(&memory, CELL, at + 50);
}

struct Disks {
    backend: Arc<dyn StorageBackend>,
    _dir: tempfile::TempDir,
}

fn disks() -> Disks {
    let dir = tempfile::tempdir().unwrap();
    let backend = copy::open(&dir.path().join("disks")).unwrap();
    Disks { backend, _dir: dir }
}

fn volume(name: &str) -> VolumeName {
    VolumeName::new(name).unwrap()
}

#[test]
fn drives_are_frozen_with_the_memory() {
    let Some(host) = host() else { return };
    let dir = tempfile::tempdir().unwrap();
    let disks = disks();
    let disk = disks.backend.create(&volume("root"), 1 << 20).unwrap();
    disk.write_vectored_at(&[std::io::IoSlice::new(b"before")], 4096)
        .unwrap();
    let config = config(4, COUNTER, Entry::Pvh)
        .with_device("root", ModelConfig::Drive(Default::default()))
        .with_device("entropy", ModelConfig::ENTROPY)
        .with_device("balloon", ModelConfig::Balloon(BalloonConfig::default()));
    let bindings = Bindings::default().with_drive(
        "root",
        DriveBinding::volume(disks.backend.clone(), disk.clone()),
    );
    let machine = Machine::boot(&host, &config, bindings).unwrap();
    let mut running = machine.start().unwrap();
    std::thread::sleep(Duration::from_millis(5));
    let paused = running.pause().unwrap();
    let saved = paused
        .save(dir.path(), SaveOptions::new().unwrap())
        .unwrap();
    drop(paused);
    disk.write_vectored_at(&[std::io::IoSlice::new(b"after!")], 4096)
        .unwrap();
    assert_eq!(saved.layers.len(), 1);

    let raw = RawSnapshot::open(&saved.path).unwrap();
    let template = Template::load(&host, &raw, Verify::None).unwrap();
    let origin = template.origin().unwrap();
    assert_eq!(origin.disks.len(), 1);
    assert_eq!(origin.disks[0].backend, "copy");
    // Without a volume, with a wrong one, with one too many: each is named.
    let error = template.fork(Bindings::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Bindings);
    let small = disks.backend.create(&volume("small"), 4096).unwrap();
    let bind = |v| DriveBinding::volume(disks.backend.clone(), v);
    let wrong = Bindings::default()
        .with_drive("root", bind(small.clone()))
        .with_drive("other", bind(small));
    let error = format!("{:?}", template.fork(wrong).unwrap_err());
    assert!(error.contains("4096") && error.contains("other"), "{error}");

    let layer = LayerName::new(origin.disks[0].layer.clone()).unwrap();
    for copy in ["copy1", "copy2"] {
        let forked = disks.backend.fork(&layer, &volume(copy)).unwrap();
        let mut bytes = [0; 6];
        let mut read = [std::io::IoSliceMut::new(&mut bytes)];
        forked.read_vectored_at(&mut read, 4096).unwrap();
        assert_eq!(&bytes, b"before");
        let machine = template
            .fork(Bindings::default().with_drive("root", bind(forked)))
            .unwrap();
        let running = machine.start().unwrap();
        drop(running.stop());
        // The machine has let go of its volume.
        disks
            .backend
            .open(&volume(copy), Access::ReadWrite)
            .unwrap();
    }
}

#[test]
fn a_failed_snapshot_leaves_nothing() {
    let Some(host) = host() else { return };
    let dir = tempfile::tempdir().unwrap();
    let disks = disks();
    let disk = disks.backend.create(&volume("root"), 1 << 20).unwrap();
    let config =
        config(4, COUNTER, Entry::Pvh).with_device("root", ModelConfig::Drive(Default::default()));
    let bindings =
        Bindings::default().with_drive("root", DriveBinding::volume(disks.backend.clone(), disk));
    let mut running = Machine::boot(&host, &config, bindings)
        .unwrap()
        .start()
        .unwrap();
    let memory = Arc::clone(running.pause().unwrap().memory());
    let mut options = SaveOptions::new().unwrap();
    // A name that the format refuses, found when everything else is done.
    options.metadata.name = Some(String::new());
    let paused = running.pause().unwrap();
    paused.save(dir.path(), options.clone()).unwrap_err();
    assert!(is_empty(dir.path()));
    assert!(disks.backend.layers().unwrap().is_empty());
    paused
        .save(&dir.path().join("not there"), options.clone())
        .unwrap_err();
    assert!(disks.backend.layers().unwrap().is_empty());
    // A layer of that name is there already: it is not ours to delete.
    options.metadata.name = None;
    let layer = LayerName::new(format!("{}-root", options.id)).unwrap();
    let durability = offshoot_storage::Durability::Now;
    disks
        .backend
        .freeze(&volume("root"), &layer, durability)
        .unwrap();
    let error = paused.save(dir.path(), options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Storage);
    assert_eq!(disks.backend.layers().unwrap(), [layer]);
    assert!(is_empty(dir.path()));
    paused.resume().unwrap();
    let at = cell(&memory, CELL);
    wait_for(&memory, CELL, at + 1);
}

/// Writes a snapshot of `state` as it is, whatever it is, and loads it.
fn load(
    host: &Arc<Host>,
    template: &ManifestParts,
    change: impl FnOnce(&mut SnapshotContent),
) -> Result<Template, Error> {
    let dir = tempfile::tempdir().unwrap();
    let id = SnapshotId::generate().unwrap();
    let mut writer = SnapshotWriter::create(dir.path(), id).unwrap();
    let image = writer
        .memory_image(template.memory.layout().clone())
        .unwrap();
    for chunk in 0..image.layout().chunk_count() {
        image.zero_chunk(chunk).unwrap();
    }
    let mut content = SnapshotContent {
        created: Timestamp::now(),
        requirements: template.requirements.clone(),
        disks: template.disks.clone(),
        metadata: template.metadata.clone(),
        sections: template.sections.clone(),
    };
    change(&mut content);
    let path = writer.publish(image.finish().unwrap(), content).unwrap();
    Template::load(host, &RawSnapshot::open(&path).unwrap(), Verify::Eager)
}

/// A small machine's snapshot, and its state.
fn sample(host: &Arc<Host>) -> (ManifestParts, MachineState) {
    let dir = tempfile::tempdir().unwrap();
    let config = config(4, COUNTER, Entry::Pvh).with_device("entropy", ModelConfig::ENTROPY);
    let mut machine = Machine::boot(host, &config, Bindings::default()).unwrap();
    let paused = machine.paused();
    let saved = paused
        .save(dir.path(), SaveOptions::new().unwrap())
        .unwrap();
    let parts = RawSnapshot::open(&saved.path)
        .unwrap()
        .manifest()
        .clone()
        .into_parts();
    (parts, paused.capture().unwrap())
}

#[test]
fn hostile_states_are_refused() {
    let Some(host) = host() else { return };
    let (parts, state) = sample(&host);
    load(&host, &parts, |_| ()).unwrap();
    let with = |change: &dyn Fn(&mut MachineState)| {
        let mut state = state.clone();
        change(&mut state);
        load(&host, &parts, |c| c.sections = sections(&state).unwrap())
    };
    let vcpu = |change: &dyn Fn(&mut VcpuState)| with(&|s| change(&mut s.vcpus[0]));
    let bad: Vec<(&str, Result<Template, Error>)> = vec![
        (
            "no vCPU",
            with(&|s| {
                s.platform.vcpus = 0;
                s.vcpus.clear();
            }),
        ),
        ("a vCPU that is not there", with(&|s| s.platform.vcpus = 2)),
        (
            "a vCPU too many",
            with(&|s| s.vcpus.push(s.vcpus[0].clone())),
        ),
        ("other RAM", with(&|s| s.platform.ram = 8 << 20)),
        ("impossible RAM", with(&|s| s.platform.ram = u64::MAX)),
        (
            "a device without a name",
            with(&|s| s.platform.devices[0].clear()),
        ),
        (
            "a device that is not there",
            with(&|s| s.platform.devices.push("x".into())),
        ),
        (
            "a device too many",
            with(&|s| s.devices.push(s.devices[0].clone())),
        ),
        ("no CPUID", vcpu(&|v| v.cpuid.clear())),
        ("too much CPUID", vcpu(&|v| v.cpuid = vec![v.cpuid[0]; 257])),
        ("an MSR twice", vcpu(&|v| v.msrs.push(v.msrs[0]))),
        ("a short XSAVE area", vcpu(&|v| v.xsave.truncate(4092))),
        ("an odd XSAVE area", vcpu(&|v| v.xsave.push(0))),
    ];
    for (what, result) in bad {
        let error = result.expect_err(what);
        assert_eq!(error.kind(), ErrorKind::BadState, "{what}: {error:?}");
    }
    // What another host could run is a mismatch, with every reason.
    let error = vcpu(&|v| {
        v.msrs[0].index = 0xdead_beef;
        v.xsave.resize(1 << 20, 0);
        for entry in &mut v.cpuid {
            entry.ecx = u32::MAX;
        }
    })
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Mismatch);
    let text = error.to_string();
    for reason in ["0xdeadbeef", "1048576", "CPUID"] {
        assert!(text.contains(reason), "{text}");
    }
    // The requirements are looked at before anything else.
    let error = load(&host, &parts, |c| {
        c.requirements.cpu_vendor = "GenuineOther".into();
        c.requirements.msrs = vec![0xdead_beef];
        c.sections.clear();
    })
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Mismatch);
    let text = error.to_string();
    assert!(
        text.contains("GenuineOther") && text.contains("0xdeadbeef"),
        "{text}"
    );
    // Left-over state would be lost.
    let error = load(&host, &parts, |c| {
        let extra = Section {
            instance: 9,
            ..c.sections[0].clone()
        };
        c.sections.push(extra);
    })
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadState);
    let disk = offshoot_snapshot_format::Disk {
        id: "root".into(),
        backend: "copy".into(),
        layer: "layer".into(),
        size: 512,
        read_only: false,
    };
    let error = load(&host, &parts, |c| c.disks.push(disk)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadState);
    let larger = layout(crate::RamSize::from_mib(8).unwrap()).unwrap();
    assert_ne!(*parts.memory.layout(), larger);
}

/// States whose bytes were changed at random are refused, or run: nothing panics.
#[test]
fn random_states_do_no_harm() {
    let Some(host) = host() else { return };
    let (parts, _) = sample(&host);
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed >> 16).unwrap()
    };
    let (mut refused, mut built) = (0, 0);
    for _ in 0..400 {
        let template = load(&host, &parts, |content| {
            for _ in 0..=random() % 3 {
                let at = random() % content.sections.len();
                let payload = &mut content.sections[at].payload;
                let byte = random() % payload.len();
                payload[byte] ^= 1 << (random() % 8);
            }
        });
        match template.and_then(|template| template.fork(Bindings::default())) {
            Ok(machine) => {
                built += 1;
                let running = machine.start().unwrap();
                drop(running.stop());
            }
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 0 && built > 0, "{refused} refused, {built} built");
}
