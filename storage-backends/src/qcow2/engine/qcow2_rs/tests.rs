use std::os::unix::fs::FileExt;

use super::*;
use crate::qcow2::format::{NewImage, write_new};

/// A new image of 1 MiB.
fn image() -> (std::fs::File, Qcow2Rs) {
    let file = tempfile::tempfile().unwrap();
    let new = NewImage {
        size: 1 << 20,
        cluster_bits: 16,
        backing: None,
    };
    let header = write_new(&file, &new).unwrap();
    let top = Top {
        label: "the image".to_owned(),
        file: Arc::new(file.try_clone().unwrap()),
        header,
        backing: None,
        writable: true,
    };
    (file, Qcow2Rs::open(&Arc::new(top), "open").unwrap())
}

fn write(engine: &Qcow2Rs, offset: u64, data: &[u8]) -> io::Result<()> {
    engine.write(&[IoSlice::new(data)], offset)
}

/// Left to itself, the library ends the process here.
#[test]
fn a_disk_that_cannot_be_flushed_is_reported_and_dropped_without_an_abort() {
    let (file, engine) = image();
    write(&engine, 0, &[1; 100_000]).unwrap();
    let before = file.metadata().unwrap().len();
    engine.file.close();
    engine.flush().unwrap_err();
    write(&engine, 200_000, &[1]).unwrap_err();
    drop(engine);
    // No table was written: what is on the disk is the empty image.
    assert_eq!(file.metadata().unwrap().len(), before);
    let mut l1 = [0xee; 8];
    file.read_exact_at(&mut l1, 3 << 16).unwrap();
    assert_eq!(l1, [0; 8]);
}

/// A flush that fails does not make the next one lie.
#[test]
fn metadata_that_could_not_be_written_is_written_by_the_next_flush() {
    let (file, engine) = image();
    write(&engine, 0, &[1; 100_000]).unwrap();
    engine.file.fail_writes(true);
    engine.flush().unwrap_err();
    engine.flush().unwrap_err();
    engine.file.fail_writes(false);
    engine.flush().unwrap();
    let mut l1 = [0; 8];
    file.read_exact_at(&mut l1, 3 << 16).unwrap();
    assert_ne!(l1, [0; 8]);
    let mut back = vec![0; 100_000];
    engine.read(&mut [IoSliceMut::new(&mut back)], 0).unwrap();
    assert!(back.iter().all(|b| *b == 1));
}

/// The library's way of growing the refcount table loses the old entries.
#[test]
fn a_full_refcount_table_is_no_space() {
    let (_file, engine) = image();
    write(&engine, 0, &[1]).unwrap();
    if let Some(disk) = lock(&engine.disk).as_mut() {
        disk.pretend_full();
    }
    write(&engine, 10, &[2]).unwrap();
    let error = write(&engine, 500_000, &[1]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    engine.flush().unwrap();
}

/// A sealed image has become a layer.
#[test]
fn a_sealed_image_is_not_written_to() {
    let (_file, engine) = image();
    write(&engine, 0, &[1; 10]).unwrap();
    engine.flush().unwrap();
    engine.seal();
    let error = write(&engine, 0, &[2; 10]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn a_table_that_could_not_be_read_ends_the_use_of_the_image() {
    let (_file, engine) = image();
    write(&engine, 0, &[1; 10]).unwrap();
    engine.flush().unwrap();
    if let Some(disk) = lock(&engine.disk).as_mut() {
        disk.forget_tables();
    }
    engine.file.fail_reads(true);
    let mut buf = [0; 10];
    engine
        .read(&mut [IoSliceMut::new(&mut buf)], 0)
        .unwrap_err();
    engine.file.fail_reads(false);
    // The library would now say that there is nothing.
    let error = engine
        .read(&mut [IoSliceMut::new(&mut buf)], 0)
        .unwrap_err();
    assert!(error.to_string().contains("open it again"), "{error}");
}
