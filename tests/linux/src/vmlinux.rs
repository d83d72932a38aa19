//! The ELF image within a bzImage (Linux `Documentation/arch/x86/boot.rst`).

use crate::Error;

/// `setup_sects`: sectors of the real-mode part behind the first; 0 stands for 4.
const SETUP_SECTS: usize = 0x1f1;
/// `payload_offset`, from the start of the protected-mode part, and `payload_length`.
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;
/// LZ4's legacy frame: blocks of at most 8 MiB of plain text, each behind its length.
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const LZ4_BLOCK: usize = 8 << 20;

/// Takes the kernel out of its self-extracting image.
pub(crate) fn extract(bzimage: &[u8]) -> Result<Vec<u8>, Error> {
    let short = Error::Kernel("it is cut short");
    let payload = payload(bzimage).ok_or(short)?;
    let Some(mut rest) = payload.strip_prefix(&LZ4_LEGACY) else {
        return Err(Error::Kernel("its payload is not compressed with LZ4"));
    };
    let mut kernel = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    // Behind the last block lie 4 bytes more: the length of the whole, which the build appends.
    while rest.len() > 4 {
        let length = u32_at(rest, 0).unwrap_or(0);
        let compressed = rest
            .get(4..)
            .and_then(|rest| rest.get(..length))
            .ok_or(Error::Kernel("an LZ4 block is cut short"))?;
        let plain = lz4_flex::block::decompress_into(compressed, &mut block)
            .map_err(|_| Error::Kernel("an LZ4 block is damaged"))?;
        kernel.extend_from_slice(&block[..plain]);
        rest = &rest[4 + length..];
    }
    if u32_at(rest, 0) == Some(kernel.len()) && kernel.starts_with(b"\x7fELF") {
        Ok(kernel)
    } else {
        Err(Error::Kernel(
            "its payload is not the ELF image it should be",
        ))
    }
}

fn payload(bzimage: &[u8]) -> Option<&[u8]> {
    let setup = match bzimage.get(SETUP_SECTS)? {
        0 => 4,
        sectors => usize::from(*sectors),
    };
    let start = (setup + 1) * SECTOR + u32_at(bzimage, PAYLOAD_OFFSET)?;
    bzimage
        .get(start..)?
        .get(..u32_at(bzimage, PAYLOAD_LENGTH)?)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    let word = bytes.get(at..)?.first_chunk()?;
    usize::try_from(u32::from_le_bytes(*word)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with `kernel` in blocks of 64 KiB.
    fn bzimage(kernel: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY.to_vec();
        for block in kernel.chunks(65536) {
            let compressed = lz4_flex::block::compress(block);
            payload.extend(u32::try_from(compressed.len()).unwrap().to_le_bytes());
            payload.extend(compressed);
        }
        payload.extend(u32::try_from(kernel.len()).unwrap().to_le_bytes());
        let mut image = vec![0; 2 * SECTOR + 16];
        image[SETUP_SECTS] = 1;
        image[PAYLOAD_OFFSET] = 16;
        let length = u32::try_from(payload.len()).unwrap().to_le_bytes();
        image[PAYLOAD_LENGTH..][..4].copy_from_slice(&length);
        image.extend(payload);
        image
    }

    fn kernel() -> Vec<u8> {
        let mut kernel = b"\x7fELF".to_vec();
        kernel.extend((0..100_000_u32).flat_map(u32::to_le_bytes));
        kernel
    }

    #[test]
    fn what_was_packed_comes_out() {
        assert!(extract(&bzimage(&kernel())).unwrap() == kernel());
    }

    #[test]
    fn damage_is_an_error() {
        let image = bzimage(&kernel());
        for length in [0, 0x200, 0x24e, 2 * SECTOR + 18, image.len() - 1] {
            assert!(extract(&image[..length]).is_err(), "cut at {length}");
        }
        let mut other = image.clone();
        other[2 * SECTOR + 16] = 0xfd;
        assert!(matches!(extract(&other), Err(Error::Kernel(what)) if what.contains("LZ4")));
    }
}
