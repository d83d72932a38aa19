//! Volumes, layers and their life.

use offshoot_storage::qcow2::{EngineKind, Qcow2Backend, Qcow2Options};
use offshoot_storage::{
    Access, Durability, ErrorKind, LayerName, StorageBackend, Volume, VolumeName,
};

use crate::oracle::{Place, Random, check, compare, qemu_img_missing, read, same, write};

const MIB: u64 = 1 << 20;

pub(crate) fn v(name: &str) -> VolumeName {
    VolumeName::new(name).unwrap()
}

pub(crate) fn l(name: &str) -> LayerName {
    LayerName::new(name).unwrap()
}

/// The engines of this build.
pub(crate) fn engines() -> impl Iterator<Item = EngineKind> {
    [EngineKind::Imago, EngineKind::Qcow2Rs]
        .into_iter()
        .filter(|e| e.is_compiled_in())
}

pub(crate) fn open(place: &Place, engine: EngineKind) -> Qcow2Backend {
    Qcow2Backend::open_store(
        &place.store(),
        Qcow2Options {
            engine,
            ..Qcow2Options::default()
        },
    )
    .unwrap()
}

/// Random operations on a volume and on a byte vector.
pub(crate) fn churn(volume: &dyn Volume, model: &mut [u8], random: &mut Random, operations: u32) {
    let size = model.len() as u64;
    for _ in 0..operations {
        let offset = random.below(size);
        let len = match random.below(4) {
            0 => random.below(300 << 10),
            1 => 4096,
            _ => random.below(9000),
        }
        .min(size - offset);
        let range = offset as usize..(offset + len) as usize;
        match random.below(10) {
            0 => {
                volume.discard(offset, len).unwrap();
                model[range].fill(0);
            }
            1 => {
                volume
                    .write_zeroes(offset, len, random.below(2) == 0)
                    .unwrap();
                model[range].fill(0);
            }
            2..=5 => assert_eq!(read(volume, offset, len as usize), model[range]),
            _ => {
                let byte = random.next() as u8;
                let data: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8) | 1).collect();
                write(volume, offset, &data);
                model[range].copy_from_slice(&data);
            }
        }
        if random.below(200) == 0 {
            volume.flush().unwrap();
        }
    }
}

/// A lineage with writes on all sides, compared with byte vectors through the backend and with
/// `qemu-img`, open, after a freeze, after a reopen and after a flatten.
#[test]
fn volumes_match_their_models_over_freeze_fork_reopen_and_flatten() {
    for engine in engines() {
        let place = Place::new();
        let backend = open(&place, engine);
        let mut random = Random(0x0ff5_4007);
        let size = 6 * MIB + 512;
        let mut model = vec![0; size as usize];
        let volume = backend.create(&v("base"), size).unwrap();
        same(&*volume, &model);
        churn(&*volume, &mut model, &mut random, 600);

        let mut lineage = vec![("base".to_owned(), volume, model)];
        for generation in 0..4 {
            let (name, volume, model) = lineage.last_mut().unwrap();
            let layer = l(&format!("layer-{generation}"));
            backend
                .freeze(&v(name), &layer, Durability::Deferred)
                .unwrap();
            backend.sync_layer(&layer).unwrap();
            let at_freeze = model.clone();
            // The old handle goes on, on its new overlay.
            churn(&**volume, model, &mut random, 200);
            let fork = format!("fork-{generation}");
            let child = backend.fork(&layer, &v(&fork)).unwrap();
            let mut child_model = at_freeze.clone();
            churn(&*child, &mut child_model, &mut random, 400);
            same(&*backend.open_layer(&layer).unwrap(), &at_freeze);
            lineage.push((fork, child, child_model));
        }
        for (name, volume, model) in &lineage {
            same(&**volume, model);
            volume.flush().unwrap();
            backend.check(&v(name)).unwrap();
            if !qemu_img_missing() {
                check(&place.volume(name));
                compare(&place, &place.volume(name), model);
            }
        }
        let models: Vec<_> = lineage
            .into_iter()
            .map(|(name, _, model)| (name, model))
            .collect();
        for (name, model) in &models {
            same(&*backend.open(&v(name), Access::ReadOnly).unwrap(), model);
            same(&*backend.open(&v(name), Access::ReadWrite).unwrap(), model);
            backend.flatten(&v(name)).unwrap();
            same(&*backend.open(&v(name), Access::ReadOnly).unwrap(), model);
            if !qemu_img_missing() {
                check(&place.volume(name));
                compare(&place, &place.volume(name), model);
            }
        }
        for generation in (0..4).rev() {
            backend
                .delete_layer(&l(&format!("layer-{generation}")))
                .unwrap();
        }
        assert!(backend.layers().unwrap().is_empty());
    }
}

#[test]
fn names_locks_and_dependencies_are_kept() {
    for engine in engines() {
        let place = Place::new();
        let backend = open(&place, engine);
        let volume = backend.create(&v("a"), MIB).unwrap();
        assert_eq!(
            backend.create(&v("a"), MIB).unwrap_err().kind(),
            ErrorKind::Exists
        );
        assert_eq!(
            backend.open(&v("a"), Access::ReadWrite).unwrap_err().kind(),
            ErrorKind::InUse
        );
        assert_eq!(
            backend.open(&v("a"), Access::ReadOnly).unwrap_err().kind(),
            ErrorKind::InUse
        );
        assert_eq!(
            backend.delete(&v("a")).unwrap_err().kind(),
            ErrorKind::InUse
        );
        assert_eq!(
            backend.flatten(&v("a")).unwrap_err().kind(),
            ErrorKind::InUse
        );

        // Another backend object is like another process.
        let other = open(&place, engine);
        assert_eq!(
            other
                .freeze(&v("a"), &l("x"), Durability::Now)
                .unwrap_err()
                .kind(),
            ErrorKind::InUse
        );
        assert_eq!(
            other.open(&v("a"), Access::ReadWrite).unwrap_err().kind(),
            ErrorKind::InUse
        );

        backend.freeze(&v("a"), &l("one"), Durability::Now).unwrap();
        assert_eq!(
            backend
                .freeze(&v("a"), &l("one"), Durability::Now)
                .unwrap_err()
                .kind(),
            ErrorKind::Exists
        );
        assert_eq!(
            backend.delete_layer(&l("one")).unwrap_err().kind(),
            ErrorKind::InUse
        );
        let fork = other.fork(&l("one"), &v("b")).unwrap();
        drop(volume);
        backend.delete(&v("a")).unwrap();
        assert_eq!(
            backend.open(&v("a"), Access::ReadOnly).unwrap_err().kind(),
            ErrorKind::NotFound
        );
        assert_eq!(
            backend.delete_layer(&l("one")).unwrap_err().kind(),
            ErrorKind::InUse
        );
        drop(fork);
        // Nobody has it open any more, and still a volume stands on it.
        assert_eq!(
            backend.delete_layer(&l("one")).unwrap_err().kind(),
            ErrorKind::InUse
        );
        backend.freeze(&v("b"), &l("two"), Durability::Now).unwrap();
        backend.delete(&v("b")).unwrap();
        assert_eq!(
            backend.delete_layer(&l("one")).unwrap_err().kind(),
            ErrorKind::InUse
        );
        backend.delete_layer(&l("two")).unwrap();
        backend.delete_layer(&l("one")).unwrap();
        assert_eq!(
            backend.delete_layer(&l("one")).unwrap_err().kind(),
            ErrorKind::NotFound
        );
        assert!(backend.volumes().unwrap().is_empty() && backend.layers().unwrap().is_empty());
    }
}

#[test]
fn a_chain_at_its_longest_says_so_and_flatten_shortens_it() {
    for engine in engines() {
        let place = Place::new();
        let options = Qcow2Options {
            engine,
            max_chain: 4,
            ..Qcow2Options::default()
        };
        let backend = Qcow2Backend::open_store(&place.store(), options).unwrap();
        let volume = backend.create(&v("a"), MIB).unwrap();
        for i in 0..3_u8 {
            write(&*volume, u64::from(i) * 1000, &[i + 1; 1000]);
            backend
                .freeze(&v("a"), &l(&format!("l{i}")), Durability::Now)
                .unwrap();
        }
        let error = backend
            .freeze(&v("a"), &l("l3"), Durability::Now)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ChainTooLong);
        write(&*volume, 3000, b"still writable");
        assert_eq!(backend.layers().unwrap().len(), 3);
        let fork = backend.fork(&l("l2"), &v("b")).unwrap();
        assert_eq!(read(&*fork, 2999, 1), [3]);
        drop((volume, fork));
        backend.flatten(&v("a")).unwrap();
        backend.freeze(&v("a"), &l("l3"), Durability::Now).unwrap();
        let again = backend.open(&v("a"), Access::ReadOnly).unwrap();
        assert_eq!(read(&*again, 2999, 4), [3, b's', b't', b'i']);
        assert_eq!(read(&*again, 0, 1), [1]);
    }
}
