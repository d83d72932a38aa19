//! Arbitrary drivers: any access, in any order, of any width.

use proptest::prelude::*;

use super::{ALL, device, new_driver};
use crate::virtio::mmio::status::Status;
use crate::virtio::mmio::tests::echo::Echo;
use crate::virtio::testing::Driver;

#[derive(Debug, Clone)]
enum Step {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Word(u64, u32),
    Negotiate,
    SetUp,
    Work,
    QuiesceAndResume,
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        10 => (0_u64..0x44).prop_map(|i| i * 4),
        2 => 0_u64..0x1010,
        1 => any::<u64>(),
    ]
}

fn word() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0_u32..20,
        2 => (0_u32..32).prop_map(|bit| 1 << bit),
        2 => (0_u32..0x1000).prop_map(|page| page << 8),
        1 => any::<u32>(),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (offset(), 0_usize..17).prop_map(|(o, n)| Step::Read(o, n)),
        2 => (offset(), prop::collection::vec(any::<u8>(), 0..17)).prop_map(|(o, d)| Step::Write(o, d)),
        8 => (offset(), word()).prop_map(|(o, w)| Step::Word(o, w)),
        3 => (Just(0x70), prop::sample::select(vec![0, 1, 3, 11, 15, 128, 143])).prop_map(|(o, w)| Step::Word(o, w)),
        2 => Just(Step::Negotiate),
        2 => Just(Step::SetUp),
        1 => Just(Step::Work),
        1 => Just(Step::QuiesceAndResume),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// No access panics, every status that can be read is one that 3.1.1 allows, and what is left at
    /// the end can be saved, restored and saved again unchanged.
    #[test]
    fn arbitrary_accesses(steps in prop::collection::vec(step(), 0..60)) {
        let (ram, _echo, mut driver) = new_driver();
        for step in steps {
            match step {
                Step::Read(offset, len) => driver.transport.read(offset, &mut vec![0; len]),
                Step::Write(offset, data) => driver.transport.write(offset, &data),
                Step::Word(offset, word) => driver.transport.write(offset, &word.to_le_bytes()),
                Step::Negotiate => {
                    driver.negotiate(ALL);
                }
                Step::SetUp => {
                    driver.queues.clear();
                    driver.set_up_queues(&ram, true);
                }
                Step::Work => driver.run(),
                Step::QuiesceAndResume => {
                    driver.transport.quiesce().unwrap();
                    driver.transport.resume().unwrap();
                }
            }
            let status = driver.get(0x70);
            prop_assert!(Status::from_saved(status).is_some(), "status {status:#x}");
        }
        driver.transport.quiesce().unwrap();
        let state = driver.transport.save().unwrap();
        let copy = Driver::restore(&ram, &state, device(&Echo::new()), Vec::new());
        prop_assert_eq!(copy.unwrap().transport.save().unwrap(), state);
    }
}
