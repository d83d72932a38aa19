//! Which engines there are, and that they understand one another.

use offshoot_storage::qcow2::EngineKind;
use offshoot_storage::{ErrorKind, open_backend};

use crate::oracle::Place;

#[test]
fn an_engine_that_is_not_compiled_in_is_refused_in_one_sentence() {
    for engine in [EngineKind::Imago, EngineKind::Qcow2Rs] {
        let place = Place::new();
        let opened = open_backend(&format!("qcow2:{engine}"), &place.store());
        if engine.is_compiled_in() {
            opened.unwrap();
            continue;
        }
        let error = opened.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(
            why,
            format!(
                "the qcow2 engine {engine} is not part of this build; build with the cargo feature {engine}"
            )
        );
        assert!(!place.store().exists(), "something was made all the same");
    }
}

#[test]
fn an_engine_that_there_is_not_is_refused() {
    let place = Place::new();
    let error = open_backend("qcow2:qemu", &place.store()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

/// What one engine has made, frozen and left behind, the other goes on with, and back again.
#[cfg(all(feature = "imago", feature = "qcow2-rs"))]
#[test]
fn each_engine_goes_on_with_the_others_store() {
    use crate::basics::{churn, l, open, v};
    use crate::oracle::{Random, check, compare, qemu_img_missing, same};
    use offshoot_storage::{Access, Durability, StorageBackend};

    for turns in [
        [EngineKind::Imago, EngineKind::Qcow2Rs, EngineKind::Imago],
        [EngineKind::Qcow2Rs, EngineKind::Imago, EngineKind::Qcow2Rs],
    ] {
        let place = Place::new();
        let mut random = Random(0x0ff5_4008);
        let size = 3 * (1 << 20) + 512;
        let mut model = vec![0; size as usize];
        open(&place, turns[0]).create(&v("base"), size).unwrap();
        let mut frozen: Vec<Vec<u8>> = Vec::new();
        for (turn, engine) in turns.into_iter().enumerate() {
            let backend = open(&place, engine);
            let volume = backend.open(&v("base"), Access::ReadWrite).unwrap();
            same(&*volume, &model);
            // Twice, so that each engine also changes what the other has written to an image.
            for part in 0..2 {
                churn(&*volume, &mut model, &mut random, 300);
                if part == 0 {
                    let layer = l(&format!("layer-{turn}"));
                    backend.freeze(&v("base"), &layer, Durability::Now).unwrap();
                    frozen.push(model.clone());
                }
            }
            volume.flush().unwrap();
            same(&*volume, &model);
            drop(volume);
            backend.check(&v("base")).unwrap();
            for (number, content) in frozen.iter().enumerate() {
                let layer = l(&format!("layer-{number}"));
                same(&*backend.open_layer(&layer).unwrap(), content);
            }
            if !qemu_img_missing() {
                check(&place.volume("base"));
                compare(&place, &place.volume("base"), &model);
            }
        }
    }
}
