//! What a well-behaved driver asks for (virtio 1.2, 5.2.6).

use super::*;

#[test]
fn writes_are_read_back_and_reach_the_file() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine);
        let data = pattern(1, 8192);
        assert_eq!(rig.write(17, &data), OK);
        let answer = rig.read(17, 8192);
        assert_eq!(answer.status, OK);
        assert_eq!(answer.data, data);
        assert_eq!(answer.used, 8193);
        assert_eq!(rig.volume.content()[17 * 512..][..8192], data);
    }
}
